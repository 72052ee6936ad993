"""What `--source` names: files found, rows counted, ranges cut, rows read back. `formats` says what can be read.

In: names of sources. Out: a plan of ranges, and the rows of each. May know: pyarrow, datasets (in `hub`), corpus,
storage, errors; no torch.
"""
