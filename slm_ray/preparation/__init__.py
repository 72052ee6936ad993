"""The pure step behind each Beam transform, and what makes a killed job continue.

In: rows of a source. Out: cleaned stories, splits, duplicates, shards, summaries. May know: sources, dataset,
tokenization, corpus, storage, errors; no Beam, torch or pydantic.
"""
