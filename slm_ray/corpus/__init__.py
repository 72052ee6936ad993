"""The embedded sample corpus, and the check that its stories are consistent.

In: numbers of stories. Out: their texts, the same for ever. May know: nothing of this project.
"""
