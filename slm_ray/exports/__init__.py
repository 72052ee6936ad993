"""Models given away: folders that other programs open, each checked against the model in torch before it appears."""
