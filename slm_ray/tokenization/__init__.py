"""Text to ids and back, and where tokenizers come from.

In: texts, or the name of a tokenizer. Out: ids, or a `Tokenizer`. May know: tokenizers, storage, errors; no torch.
"""
