"""Cleaning of one story: its cleaned text, or the reason why it is rejected.

In: the bytes of one story as a source holds them. Out: cleaned text, or a reason of `rejections.REASONS`. Comes after
`sources` and before `splits`. Pure functions of the text alone, so that no result depends on the order of stories, on
the runner or on the number of workers.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from ftfy import fix_encoding

from slm_ray.preparation.words import count_words

PART_CHARS = 2**20
_WHITE = re.compile(r"\s")
CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0e-\x1b\x7f]")  # \x1c to \x1f count as white space

_QUOTES = {"'": "‘’‚‛′ʼ", '"': "“”„‟″", "-": "‐‑‒–−", "--": "—―", "...": "…"}
_TO_ASCII = str.maketrans({sign: plain for plain, signs in _QUOTES.items() for sign in signs})
_OTHER = re.compile(f"[^\x00-\x7f{''.join(map(chr, _TO_ASCII))}]")
_INVISIBLE = re.compile("[\u00ad\u200b\u2060\ufeff]")

# ftfy takes 0.3 ms to look at a story, for each with one curly quote; this finds in 0.01 ms those that it might change:
# all signs of its heuristic (`ftfy.badness`) are two characters that stand together and are not ASCII, at least one
# of them neither a common quote nor a plain Greek or Cyrillic letter nor of a script that it does not know, or are
# one of a few characters alone. A test compares both over all pairs of the characters that ftfy knows.
_KNOWN = "\x80-\u024f\u02b0-\u038f\u03aa-\u03b0\u03ca-\u0400\u0402-\u040f\u0450\u0452-\u052f\u2010-\u2012\u2015-\u2017"
_KNOWN += "\u201a\u201b\u201e-\u2025\u2027-\u2bff\uf8ff\ufb00-\ufb06\ufffd"
_BEYOND = re.compile("[^\x00-\x7f]+")
_SUSPECT = re.compile(f"[\x80-\x9fŒœÃÂ]|[^\x00-\x7f][{_KNOWN}]|[{_KNOWN}][^\x00-\x7f]|[ВГРСΒΓΞΟ][‘“”]")
# ftfy looks at most 8 ASCII characters to either side, and is no faster on what it leaves alone. Possessive (`*+`), or
# a long text would fill the memory with ways back.
_PIECE = re.compile(r"[^\n]{0,8}?[^\x00-\x7f](?:[^\n]{0,16}[^\x00-\x7f])*+[^\n]{0,8}")


@dataclass(frozen=True, kw_only=True)
class CleaningRules:
    """How stories are cleaned, and which are rejected."""

    keep_paragraphs: bool = False
    """Keep line breaks, one between paragraphs, instead of a space."""
    repair_encoding: bool = True
    """Repair UTF-8 that was once read as another encoding."""
    normalise_quotes: bool = False
    """Write curly quotes, dashes and ellipses as ASCII."""
    min_chars: int = 50
    """Reject shorter stories, characters."""
    max_chars: int = 20_000
    """Reject longer stories, characters."""
    min_words: int = 0
    """Reject stories of fewer words, between white space; each character of Chinese, Japanese or Thai is one."""
    max_other_characters: float = 1.0
    """Reject stories with a larger share of characters neither ASCII nor common punctuation, 0 to 1; 1 rejects none."""


def repair_encoding(text: str) -> str:
    """Undo UTF-8 read as another encoding: `donâ€™t` becomes `don’t`. Other text stays as it is.

    `ftfy.fix_encoding`, and no other of ftfy's fixes, on each piece where characters beyond ASCII stand close together.
    What counts as broken is ftfy's heuristic, so its version belongs to what decides about the bytes of a data set.
    """
    if text.isascii() or not _SUSPECT.search("\n".join(_BEYOND.findall(text))):  # all that it finds is beyond ASCII
        return text
    return _PIECE.sub(lambda piece: fix_encoding(piece[0]) if _SUSPECT.search(piece[0]) else piece[0], text)


def normalise_quotes(text: str) -> str:
    """Typographic punctuation as it is typed in ASCII.

    ‘ ’ ‚ ‛ ʼ and the prime ′ become `'`; “ ” „ ‟ and ″ become `"`; hyphens, en dash and minus (‐ ‑ ‒ – −) become `-`;
    em dash and bar (— ―) become `--`; … becomes three dots. Guillemets, accents and all else stay.
    """
    return text if text.isascii() else text.translate(_TO_ASCII)


def remove_invisible(text: str) -> str:
    """Leave out what has no width and no meaning: byte order mark, soft hyphen, zero-width space, word joiner.

    They would make words that look alike differ. U+200C and U+200D stay: emoji and Persian words are made with them.
    """
    return text if text.isascii() else _INVISIBLE.sub("", text)


def clean_story(text: str, keep_paragraphs: bool = False) -> str:
    r"""Join all white space to single spaces, or keep paragraphs apart by one line break.

    `" One.\n\n Two  words.\r\n"` becomes `"One. Two words."`, with `keep_paragraphs` `"One.\nTwo words."`.
    White space and line breaks are those of `str.split` and `str.splitlines`: U+2028, U+2029, form feed and
    U+0085 break a line too.
    """
    if not keep_paragraphs:
        parts = (" ".join(part.split()) for part in _parts(text))
        return " ".join(part for part in parts if part)
    paragraphs = (" ".join(line.split()) for line in text.splitlines())
    return "\n".join(paragraph for paragraph in paragraphs if paragraph)


def _parts(text: str) -> Iterator[str]:
    """A text cut before white space about every million characters; a list of all words would fill the memory."""
    start = 0
    while len(text) - start > PART_CHARS:
        space = _WHITE.search(text, start + PART_CHARS)
        end = space.start() if space else len(text)
        yield text[start:end]
        start = end
    yield text[start:] if start else text


def rejection_reason(text: str, rules: CleaningRules | None = None) -> str | None:
    """Why this cleaned text is not taken (the first of `REASONS` that holds), or None when it is."""
    rules = rules or CleaningRules()
    if not text:
        return "empty"
    if CONTROL_CHARACTERS.search(text):
        return "control_characters"
    if len(text) < rules.min_chars:
        return "too_short"
    if len(text) > rules.max_chars:
        return "too_long"
    if rules.min_words > 1 and count_words(text) < rules.min_words:
        return "too_few_words"
    if rules.max_other_characters < 1 and other_characters(text) > rules.max_other_characters:
        return "other_characters"
    return None


def other_characters(text: str) -> float:
    """The share of characters that are neither ASCII nor among those of `normalise_quotes`: 0 of `It’s`, 1 of `да`."""
    return 0.0 if text.isascii() else len(_OTHER.findall(text)) / len(text)


def examine(raw: bytes, rules: CleaningRules) -> tuple[str, str | None]:
    """Decode, clean and judge one raw story: `(cleaned text, None)`, or `(what was found, reason)`.

    The definition of cleaning, in this order: decode; repair the encoding; remove invisible characters (of which a
    byte order mark may come out of the repair); normalise quotes; join white space; judge what is left. Plain
    ASCII is changed by the white space alone. Bytes that are not UTF-8, lone surrogates among them, are not guessed at.
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("utf-8", errors="replace"), "invalid_utf8"
    if not text.isascii():
        text = remove_invisible(repair_encoding(text) if rules.repair_encoding else text)
        text = normalise_quotes(text) if rules.normalise_quotes else text
    text = clean_story(text, rules.keep_paragraphs)
    return text, rejection_reason(text, rules)
