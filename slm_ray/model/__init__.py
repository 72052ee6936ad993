"""The decoder, its loss, and its files in the layout of Hugging Face.

In: a `ModelConfig`, token ids. Out: logits, losses, named weights. May know: torch, config, errors.
"""
