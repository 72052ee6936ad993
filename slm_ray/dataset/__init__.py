"""A data set on disk: the contract between preparation and training, which both sides import.

In: tables of tokens, or a folder. Out: a folder with a manifest, or batches in an exact order. May know: pyarrow,
storage, errors; no torch.
"""
