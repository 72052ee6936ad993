"""Where a model comes from: the chain of its version, runs, attempts and data, and the stories of each step.

In: a model, perhaps a step and its data set. Out: the chain as a record, and in words. May know: tracking, runs,
dataset, tokenization, config.
"""
