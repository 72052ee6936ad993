"""How good a model is, in numbers that anyone can compute again.

In: a model, its tokenizer, the stories of a split. Out: losses story by story, comparisons of two models, scores of
stories that the model writes, a card of all of it. May know: torch, matplotlib, jinja2, training, tracking and below.
"""
