"""The text of a token that needs no look at what stands before it.

In: how a tokenizer decodes. Out: for each id its own text, looked up once. `detokenizer.py` takes it for every token
that is written, in place of decoding two lists of them.
"""

from collections.abc import Callable, Iterable

_PARTIAL = "\ufffd"


class OwnTexts(dict[int, str]):
    """id -> text that is the same behind any text of whole characters; empty where that is not certain.

    It is where a decoder joins bytes (`joins_bytes`) and those of the token are whole characters.
    """

    def __init__(self, decode: Callable[[Iterable[int]], str], *, joins_bytes: bool) -> None:
        super().__init__()
        self._decode, self._joins_bytes = decode, joins_bytes

    def __missing__(self, token: int) -> str:
        text = self._decode([token]) if self._joins_bytes else ""
        self[token] = text = "" if _PARTIAL in text else text
        return text
