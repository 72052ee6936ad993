"""How good a model is, and whether it may take the champion's place.

In: a model, a prepared data set. Out: losses a story, differences between two models, a promotion. May know: training,
tracking, generation and what lies below them.
"""
