"""Whether one tokenizer is another, or that with more entries: so that weights learned with the one fit the other.

In: the tokenizer that a model was trained with, and that of a data set. Out: the entries that only the second has, or
the text that tells the two apart.
"""

from slm_ray.tokenization.tokenizer import PROBES, Tokenizer

AWKWARD_TEXTS = (
    *PROBES,
    "Once upon a time, there was a little girl named Lily.",
    "\"Don't!\" said Tom's mum... 'You'll fall,' she'd said; they've gone -- haven't they?",
    "one  two   three\n\n\tfour\r\n",
    "It cost $1,234.50 on 2024-01-31, i.e. 007 % of 10000000000000.",
    "na\u00efve caf\u00e9, e\u0301, \u00c5\u0308, \u1e9b\u0323, \ufb01, \uff21, \u2460",
    "\u6f22\u5b57\u304b\u306a \ud55c\uae00 \u0e20\u0e32\u0e29\u0e32\u0e44\u0e17\u0e22 \u05e9\u05dc\u05d5\u05dd",
    "\U0001f408\u200d\U0001f469\U0001f3fd \u2014 \u201cquote\u201d \u00a0 \u200b|",
    "def f(x): return {'a': [x**2, -x]}  # <b>&amp;</b> https://example.org/?q=1",
    "<|endoftext|> <|im_start|>user [INST] <pad> </s>",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
)
"""Texts in which tokenizers that look alike differ: spaces, digits, quotes, accents, scripts, markup."""
_SHOWN_IDS = 8
_SHOWN_CHARACTERS = 40


def new_entries(old: Tokenizer, new: Tokenizer) -> dict[str, int]:
    """The entries that the new tokenizer has beyond the old one's, with their ids; none where the two are the same.

    Raises:
        ValueError: an entry has another id or is missing, or a text is encoded in another way: which, in a few words.
    """
    before, after = old.entries, new.entries
    for entry, token in before.items():
        if entry not in after:
            raise ValueError(f"its entry {entry!r} is not there")
        if after[entry] != token:
            raise ValueError(f"{entry!r} is {token} in it, and {after[entry]} there")
    for text in AWKWARD_TEXTS:
        first, second = old.encode(text), new.encode(text)
        if first != second:
            at = next((at for at, (a, b) in enumerate(zip(first, second)) if a != b), min(len(first), len(second)))
            places = slice(max(at - 1, 0), at + _SHOWN_IDS)
            shown = f"{first[places]} in it, and {second[places]} there"
            raise ValueError(f"{text[:_SHOWN_CHARACTERS]!r} becomes {shown}")
    return {entry: token for entry, token in after.items() if entry not in before}
