"""The card of a model: every number with its measure, to be read by people and recomputed by anyone.

In: a model and a data set. Out: card.json, card.md and card.html, and the word whether a card is true.
"""
