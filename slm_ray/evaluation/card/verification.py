"""Is a card true? It is computed again from the model and the data, and every number is compared.

In: a card, the model, the data set. Out: which values differ. On the machine kind that the card was made on every value
must be the same to the last digit. Elsewhere, and by a version of another arithmetic, sums are rounded otherwise: there
a loss may differ by `LOSS_BOUND`, and since a draw of a token may then fall on its other side, `SAME_STORIES` of the
stories must be written again word for word. The scores are then computed from the stories in the card, and must be
equal to the last digit anywhere.
"""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slm_ray.errors import UserError, one_line, visible
from slm_ray.evaluation.card.content import (
    DIGEST,
    FORMAT_VERSION,
    Card,
    CardSubject,
    digest,
    make_card,
    scored_again,
)
from slm_ray.evaluation.card.machine import NUMERICS, machine_kind, most_threads, numerics_of
from slm_ray.evaluation.measurement import Data
from slm_ray.evaluation.writing import text_of
from slm_ray.model.threads import torch_threads
from slm_ray.tokenization.tokenizer import Tokenizer

CARD = "card.json"
MAX_CARD_BYTES = 64 * 2**20
LOSS_BOUND = 1e-5
"""By how much of its value, or by how many nats or bits, a loss may differ on another machine kind: fp32 logits differ
by about 1e-6 there."""
_GIVEN = ("prompt", "seed", "story_id")
"""What of a story is given to the model, and so the same on every machine."""
_OTHER_VERSION = (
    "made by a version of SLM-Ray whose numbers are other ones in the last digits: --verify with that version compares "
    "these too, --card with this one makes the card anew"
)
SAME_STORIES = 0.5
"""Share of the stories that must be the same on another machine kind."""
Where = tuple[str | int, ...]
_NOT_COMPARED: tuple[Where, ...] = (("model", "name"), (DIGEST,))
"""The same weights go by several names."""
_NEWER: tuple[Where, ...] = (("data", "licence"),)
"""What cards of earlier versions do not say; where it is said, it has to be true."""
_CHECK: Where = ("made_with", "thread_check")
_CHECKED: tuple[Where, ...] = tuple(("writing", name, "corpus_thread") for name in ("scores", "own_endings"))
"""Of a model of the sample corpus: by which version of its check these were counted. Another one's are not compared."""
_OTHER_CHECK = "; corpus_thread is not compared: another version of SLM-Ray counted it by another check"


@dataclass(frozen=True)
class Difference:
    """A value of a card that is not what was computed."""

    name: str
    """As `loss.bits_per_byte`."""
    stated: Any
    computed: Any

    def __str__(self) -> str:
        return f"{visible(self.name)} is {_short(self.stated)} in the card, and {_short(self.computed)} was computed"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What came of computing a card again."""

    is_same_kind: bool
    """Whether this machine is of the kind that the card was made on, and this version of SLM-Ray too."""
    is_same_version: bool = True
    """Whether the card was made by a version whose numbers have the same last digits."""
    is_same_check: bool = True
    """Whether the card's share of stories that keep their thread is by the check of this version."""
    n_values: int
    """Values that were compared."""
    differences: tuple[Difference, ...]

    def __str__(self) -> str:
        """One line for a true card, one for each value that is not, and of a card of another version what to do."""
        if self.differences:
            lines = [f"not equal: {difference}" for difference in self.differences]
            return "\n".join(lines if self.is_same_version else [*lines, _OTHER_VERSION])
        check = "" if self.is_same_check else _OTHER_CHECK
        if self.is_same_kind:
            return f"equal: {self.n_values:,} values, to the last digit{check}"
        why = "made on another kind of machine" if self.is_same_version else _OTHER_VERSION
        return f"equal: {self.n_values:,} values, losses within {LOSS_BOUND:g} ({why}){check}"

    def to_record(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"equal": not self.differences} | dataclasses.asdict(self)


def read_card(path: str) -> Card:
    """A card out of its file or the folder that it lies in.

    Raises:
        UserError: there is none, or it is not one that this version reads.
    """
    place = Path(path)
    place = place / CARD if place.is_dir() else place
    try:
        with place.open("rb") as file:
            text = file.read(MAX_CARD_BYTES + 1)
    except OSError as error:
        raise UserError(f"cannot read the card {place}: {error.strerror or error}") from error
    try:
        card = json.loads(text, object_pairs_hook=_object) if len(text) <= MAX_CARD_BYTES else None
        dict(_values(card))  # nested too deeply, it could not be compared
        json.dumps(card, ensure_ascii=False, allow_nan=False).encode("utf-8")  # half a character, it could not be shown
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place} is no card: it is no JSON that can be read") from error
    if not isinstance(card, dict) or not isinstance(card.get("model"), dict) or DIGEST not in card:
        raise UserError(f"{place} is no card that `evaluate.py --card` wrote")
    if not isinstance(card["model"].get("name"), str):
        raise UserError(f"{place} is no card: it does not name its model")
    if card.get("format_version") != FORMAT_VERSION:
        raise UserError(f"{place} has format version {_short(card.get('format_version'))}, expected {FORMAT_VERSION}")
    return card


def split_of(card: Mapping[str, Any]) -> Any:
    """The split that a card was made on. Raises: UserError when it names none."""
    return _value(card, "data", "split", ("train", "validation", "test"))


def verify(card: Card, subject: CardSubject, data: Data) -> Verdict:
    """Compute a card again and compare.

    Raises:
        UserError: the card is of another model or data set than these, or its parts are not those of a card.
    """
    for name in ("weights_sha256", "tokenizer_sha256"):
        stated, own = card["model"].get(name), subject.identity[name]
        if stated != own:
            raise UserError(f"the card is of another model: its {name} is {_short(stated)}, not {_short(own)}")
    stated = card.get("data", {}).get("fingerprint") if isinstance(card.get("data"), dict) else None
    if stated != data.manifest.fingerprint:
        raise UserError(
            f"the card is of another data set: its fingerprint is {_short(stated)}, and that of {data.folder} is "
            f"{_short(data.manifest.fingerprint)}"
        )
    stated_threads, beginnings = _made_with(card)
    threads = min(stated_threads, most_threads())  # with fewer, this machine is of another kind
    with torch_threads(threads):
        again = make_card(subject, data, beginnings, threads)
    is_same_kind = card["made_with"].get("machine") == machine_kind(threads)
    found: list[Difference] = []
    if not is_same_kind:
        try:
            found += _written_elsewhere(card, again, subject.found.tokenizer)
            again["writing"] = scored_again(subject, data, card)
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise UserError(f"the stories in the card are none: {one_line(error)}") from error
        again["made_with"]["machine"] = card["made_with"].get("machine")
    own, other = dict(_values(card)), dict(_values(again))
    is_same_check = _CHECK not in other or own.get(_CHECK) == other[_CHECK]
    unsaid = [*(where for where in _NEWER if where not in own), *(() if is_same_check else (_CHECK, *_CHECKED))]
    places = [where for where in {**own, **other} if where not in (*_NOT_COMPARED, *unsaid)]
    for where in places:
        bound = LOSS_BOUND if where[0] == "loss" and not is_same_kind else 0.0
        is_there = where in own and where in other  # what is missing is not null
        if not (is_there and _is_equal(own[where], other[where], bound)):
            found.append(Difference(_name(where), own.get(where), other.get(where)))
    if not found and digest(card) != card[DIGEST]:
        found.append(Difference(DIGEST, card[DIGEST], digest(card)))
    return Verdict(
        is_same_kind=is_same_kind,
        is_same_version=numerics_of(card["made_with"]["machine"]) == NUMERICS,
        is_same_check=is_same_check,
        n_values=len(places),
        differences=tuple(found),
    )


def _value(card: Mapping[str, Any], part: str, name: str, known: tuple[str, ...]) -> Any:
    content = card.get(part)
    value = content.get(name) if isinstance(content, dict) else None
    if value not in known:
        raise UserError(f"the card's {part}.{name} is {_short(value)}: expected one of {', '.join(known)}")
    return value


def _made_with(card: Mapping[str, Any]) -> tuple[int, int]:
    """Threads and beginnings that a card was made with."""
    try:
        threads, beginnings = card["made_with"]["machine"]["threads"], card["made_with"]["beginnings"]
    except (KeyError, TypeError) as error:
        raise UserError("the card does not say how it was made: made_with is missing a part") from error
    if type(threads) is not int or type(beginnings) is not int or not (0 < threads <= 1024 and 0 < beginnings <= 10**6):
        raise UserError("the card does not say how it was made: threads and beginnings must be numbers of at least 1")
    return threads, beginnings


def _written_elsewhere(card: Card, again: Card, tokenizer: Tokenizer) -> Iterator[Difference]:
    """Whether enough stories were written again word for word, and the others can have been written.

    Raises:
        KeyError, TypeError, ValueError, OverflowError: what stands there are no stories.
    """
    stated = card.get("writing", {}).get("stories") if isinstance(card.get("writing"), dict) else None
    computed = again["writing"]["stories"]
    stories = stated if isinstance(stated, list) else []
    same = sum(own == other for own, other in zip(stories, computed))
    if len(stories) != len(computed) or same < SAME_STORIES * len(computed):
        yield Difference("writing.stories", f"{len(stories)} stories", f"{len(computed)}, {same} of them the same")
    for number, (own, other) in enumerate(zip(stories, computed)):
        if own == other:
            continue
        text = text_of(own["tokens"], own["prompt"], tokenizer)
        for name, expected in {**{name: other[name] for name in _GIVEN}, "text": text}.items():
            if not _is_equal(own[name], expected, 0.0):
                yield Difference(f"writing.stories[{number}].{name}", own[name], expected)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON. Raises: ValueError when it says a name twice, since readers differ in which they take."""
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a name stands twice in an object")
    return content


def _values(content: Any, where: Where = ()) -> Iterator[tuple[Where, Any]]:
    """Every value of a nest of objects and lists by the keys that lead to it, which no key can stand for."""
    if isinstance(content, dict) and content:
        for key, value in content.items():
            yield from _values(value, (*where, key))
    elif isinstance(content, list) and content:
        for number, value in enumerate(content):
            yield from _values(value, (*where, number))
    else:
        yield where, content


def _name(where: Where) -> str:
    """As a person writes it: `loss.by_length[0].loss`."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in where).removeprefix(".")


def _is_equal(stated: Any, computed: Any, bound: float) -> bool:
    if bound and type(stated) is float and type(computed) is float:
        return math.isclose(stated, computed, rel_tol=bound, abs_tol=bound)
    return type(stated) is type(computed) and bool(stated == computed)


def _short(value: Any) -> str:
    """A value on one line; text of a story has its control characters written out."""
    text = value if isinstance(value, str) and value.isascii() and value.isalnum() else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
