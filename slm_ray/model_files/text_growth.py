"""How many times as long a stranger's normaliser or decoder makes a text: ten steps of 10 to 1 would fill any memory.

In: such a part of a `tokenizer.json`. Out: the growth, measured with the package's own steps, one after another. What a
step can write is known (the content of a `Replace`, the strings of a charsmap): each is led through the steps behind
it, so that rules that do not read one another's output are not multiplied. No text passes a bound on the way.
"""

import base64
import json
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import tokenizers

MAX_GROWTH = 100
"""Times as long as it was that a text may become before it is cut."""
MAX_WORK = 2_000_000
"""Steps that all that the steps can write may be led through, together."""
_PARTS = {"normalizer": "normalizers", "decoder": "decoders"}
_LONGEST = ("\ufdfa", "\u0390", "\ufb2c", "\U0001d160", "\u0130", "\u1e9b\u0323", "a", " ", "A\n", "<0x41>")
"""Letters that the steps of Unicode make longest, and some that are in every text."""
_EMPTY: dict[str, Any] = {"model": {"type": "BPE", "vocab": {}, "merges": []}}
Step = Callable[[str], str]


class GrowthError(ValueError):
    """A part makes a long text of a short one, or has more steps than can be measured; in words."""


def check_growth(content: Mapping[str, Any]) -> None:
    """Raises: GrowthError. A part that the package cannot read passes: it says better what is wrong with it."""
    for part in _PARTS:
        try:
            steps = list(_steps(content.get(part), part))
        except (ValueError, RecursionError):
            continue
        _check(steps, part)


def _check(steps: Sequence[Mapping[str, Any]], part: str) -> None:
    written = [(number, times, text) for number, step in enumerate(steps) for times, text in _written(step)]
    longest = max((len(text) for _, _, text in written), default=0)
    if longest > MAX_GROWTH:
        raise GrowthError(f"its {part} makes a text {longest:,} times as long, and {MAX_GROWTH} is the most")
    probes = [(0, len(text), text) for text in {*_LONGEST, *(pattern for step in steps for pattern in _read(step))}]
    probes += [(number + 1, times, text) for number, times, text in written]
    probes += [(start, 2 * times, 2 * text) for start, times, text in probes]
    if sum(len(steps) - start for start, _, _ in probes) > MAX_WORK:
        raise GrowthError(f"its {part} has too many rules one behind another to be measured")
    functions = [_function(step, part) for step in steps]
    for start, times, text in dict.fromkeys(probes):
        for function in functions[start:]:
            text = function(text)
            if len(text) > MAX_GROWTH * times:
                growth = len(text) // times
                raise GrowthError(f"its {part} makes a text {growth:,} times as long, and {MAX_GROWTH} is the most")


def _steps(part: object, name: str) -> Iterator[dict[str, Any]]:
    """The steps as the package reads them, which knows spellings of earlier versions too, in their order.

    Raises:
        ValueError: it does not read them.
    """
    if not isinstance(part, Mapping):
        return
    waiting = [json.loads(_opened(part, name).to_str())[name]]
    while waiting:
        step = waiting.pop()
        if step["type"] == "Sequence":
            waiting += reversed(step[_PARTS[name]])
        else:
            yield step


def _opened(part: Mapping[str, Any], name: str) -> Any:
    """A tokenizer of one part alone; nothing is encoded. Raises: ValueError."""
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(_EMPTY | {name: part}))
    except BaseException as error:
        raise _not_read(error) from error


def _not_read(error: BaseException) -> ValueError:
    """What the package gave up with, whose panics are no Exception; another error goes on. Raises: that one."""
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        raise error
    return ValueError(str(error))


def _function(step: Mapping[str, Any], part: str) -> Step:
    """The package's own step; a text that it gives up on stays as it is."""
    opened = _opened(step, part)
    inner = opened.normalizer if part == "normalizer" else opened.decoder

    def applied(text: str) -> str:
        try:
            return str(inner.normalize_str(text) if part == "normalizer" else inner.decode([text]))
        except BaseException as error:
            _not_read(error)
            return text

    return applied


def _written(step: Mapping[str, Any]) -> Iterator[tuple[int, str]]:
    """What a step can put into a text, each with how many characters it takes away for it, at least one."""
    if step["type"] == "Replace":
        yield max(1, len(step["pattern"].get("String", ""))), step["content"]
    elif step["type"] == "Prepend":
        yield 1, step["prepend"]
    elif step["type"] == "Precompiled":
        yield from ((1, text) for text in _strings(step["precompiled_charsmap"]))


def _read(step: Mapping[str, Any]) -> Iterator[str]:
    """What a step waits for, where that is a text."""
    if step["type"] == "Replace" and (pattern := step["pattern"].get("String")):
        yield pattern


def _strings(charsmap: str) -> set[str]:
    """What a charsmap of sentencepiece can write: behind the table, of a length that stands first, texts with a zero
    after each."""
    content = base64.b64decode(charsmap)
    if len(content) < 4:
        return set()
    (size,) = struct.unpack_from("<I", content)
    return {text.decode("utf-8", errors="replace") for text in content[4 + size :].split(b"\0")}
