"""Tokens of a split mapped from one flat file that the workers of a machine share: made once, in turn, and verified."""
