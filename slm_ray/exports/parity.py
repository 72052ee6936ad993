"""Whether an export computes what the model in torch computes: logits, greedy tokens, ids of awkward texts.

In: the model with its tokenizer, and a `Runtime` that opened the files of the export. Out: a `Parity` with the measured
figures, which lie beside the files as `parity.json`. An export that is further off than its bound is refused.
"""

import dataclasses
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from slm_ray.errors import UserError, visible
from slm_ray.exports.formats import Dtype
from slm_ray.generation.golden import TOLERANCE, fitting_prompts
from slm_ray.generation.torch_backend import TorchBackend
from slm_ray.model.decoder import Decoder
from slm_ray.tokenization.tokenizer import Tokenizer

Array = NDArray[Any]
PARITY = "parity.json"
WRITTEN_TOKENS = 32
"""Greedy tokens after each prompt, as far as the context reaches."""
BOUNDS: dict[Dtype, float] = {"f32": TOLERANCE, "f16": 5e-3, "bf16": 4e-2, "q8_0": 5e-2, "int8": 5e-2}
"""Largest error of a logit, relative to the largest distance of one from the mean of its row (or to 1): what is added
to all of them means nothing. A model that is rounded to f16, bf16
or 8 bits is another model; these say how far it may be from the one that was trained."""
AWKWARD_TEXTS = (
    "",
    " ",
    "Once upon a time",
    "  two  spaces  ",
    "One.\nTwo.\n\n\tThree\r\n",
    "don't, I'LL, we've, she'd, 'twas; rock'n'roll",
    "\u201cna\u00efve\u201d caf\u00e9 \u2014 e\u0301 \u00a0x",
    "\u65e5\u672c\u8a9e\u3002 \ud55c\uad6d\uc5b4 \u0440\u0443\u0441\u0441\u043a\u0438\u0439 \u0e20\u0e32\u0e29\u0e32",
    "1234567 3.14 1st \u00bd \u0663",
    "\U0001f642\U0001f469\u200d\U0001f467 \u2603\ufe0f!",
    "<s></s> [INST] <0x41> <unk>",
    "_under_score_ a+b=c; {x}[y] #1 $5 100% \\n",
    "supercalifragilisticexpialidocious" * 3,
    "\x01\x7f",
)
"""Texts whose ids a tokenizer of another program may get wrong. Not among them: the character NUL, at which programs in
C end a text."""


class ParityError(UserError):
    """An export does not compute what the model computes."""


class Runtime(Protocol):
    """A program that opened an export."""

    @property
    def name(self) -> str:
        """Which one, with its version."""

    @property
    def stop_ids(self) -> Collection[int]:
        """Tokens at which it ends a text, by the files of the export."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text, in which no special token is looked for."""

    def logits(self, tokens: Sequence[int]) -> Array:
        """(T,) ids -> (T, vocab_size) logits."""

    def write(self, tokens: Sequence[int], count: int) -> list[int]:
        """Greedy tokens after some: `count` of them, or up to an end-of-text token, which is the last then."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parity:
    """How far a program with an export is from the model in torch."""

    by: str
    """Which program."""
    largest_logit_error: float
    largest_logit: float
    """By its size, in torch."""
    bound: float
    """The largest error that is allowed here."""
    greedy_tokens: int
    greedy_tokens_equal: int
    """Up to the first that differs, of each prompt."""
    texts: int
    texts_with_equal_ids: int
    fault: str
    """Why it must not be given away; empty where it may."""

    def to_record(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "fault"}

    def __str__(self) -> str:
        """One line for a terminal."""
        return (
            f"{self.by}: logits differ by up to {self.largest_logit_error:.3g} (allowed {self.bound:.3g}), "
            f"{self.greedy_tokens_equal} of {self.greedy_tokens} greedy tokens and the ids of "
            f"{self.texts_with_equal_ids} of {self.texts} texts are equal"
        )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Story:
    """What torch makes of one prompt."""

    prompt: tuple[int, ...]
    written: tuple[int, ...]
    """Greedy tokens, up to an end-of-text token."""
    logits: Array
    """(T, vocab_size), of prompt and written tokens but the last."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Expected:
    """What every export of a model has to compute."""

    stories: tuple[Story, ...]
    ids: Mapping[str, list[int]]
    end_ids: frozenset[int]
    """Tokens that end a text everywhere."""
    stop_ids: frozenset[int]
    """All that may: the one that stands before a text ends the one before it, where a program looks for it."""

    @property
    def largest_logit(self) -> float:
        """By its size."""
        return max(float(np.abs(story.logits).max()) for story in self.stories)

    @property
    def largest_distance(self) -> float:
        """Of a logit from the mean of its row."""
        rows = [story.logits - story.logits.mean(axis=-1, keepdims=True) for story in self.stories]
        return max(float(np.abs(row).max()) for row in rows)


def expected(model: Decoder, tokenizer: Tokenizer) -> Expected:
    """Ask the model itself.

    Raises:
        ParityError: its logits are not finite.
    """
    reference = TorchRuntime(model, tokenizer.encode, tokenizer.stop_ids, "torch")
    stories = []
    for prompt in fitting_prompts(tokenizer, model.config.seq_len):
        tokens = [tokenizer.start_id, *tokenizer.encode(prompt)]
        count = min(WRITTEN_TOKENS, model.config.seq_len - len(tokens))
        written = reference.write(tokens, count)
        logits = reference.logits([*tokens, *written][: model.config.seq_len])
        if not np.isfinite(logits).all():
            raise ParityError(f"the model gives numbers that are not finite after {prompt!r}")
        stories.append(Story(prompt=tuple(tokens), written=tuple(written), logits=logits))
    return Expected(
        stories=tuple(stories),
        ids={text: tokenizer.encode(text) for text in plain_texts(tokenizer)},
        end_ids=frozenset(tokenizer.borders.end_ids),
        stop_ids=tokenizer.stop_ids,
    )


def plain_texts(tokenizer: Tokenizer) -> list[str]:
    """`AWKWARD_TEXTS` without those that have the letters of one of its special tokens: whether these are text or token
    is an option of each program."""
    special = [one["content"] for one in json.loads(tokenizer.to_json())["added_tokens"] if one["special"]]
    return [text for text in AWKWARD_TEXTS if not any(letters in text for letters in special)]


class TorchRuntime:
    """A model in torch: the one that is exported, or what was read back from an export."""

    def __init__(
        self, model: Decoder, encode: Callable[[str], list[int]], stop_ids: Collection[int], name: str
    ) -> None:
        self._model, self.stop_ids = model.eval(), stop_ids
        self.encode = encode
        self.name = name

    def logits(self, tokens: Sequence[int]) -> Array:
        """See `Runtime`."""
        with torch.inference_mode():
            values: Array = self._model(torch.tensor([list(tokens)]))[0].float().numpy()
        return values

    def write(self, tokens: Sequence[int], count: int) -> list[int]:
        """See `Runtime`."""
        backend = TorchBackend(self._model, 1)

        def last_logits(ahead: Sequence[int]) -> Array:
            found = backend.prefill(0, ahead, start=backend.length(0))
            assert found is not None
            last: Array = found[-1]
            return last

        return greedy(last_logits, tokens, count, self.stop_ids)


def greedy(
    last_logits: Callable[[Sequence[int]], Array], tokens: Sequence[int], count: int, stop_ids: Collection[int]
) -> list[int]:
    """Take the likeliest token again and again, up to one that ends a text.

    last_logits: gives (vocab_size,) after tokens that go on from those of the call before.
    """
    written: list[int] = []
    ahead = list(tokens)
    while len(written) < count:
        written.append(int(last_logits(ahead).argmax()))
        if written[-1] in stop_ids:
            break
        ahead = written[-1:]
    return written


def compare(runtime: Runtime, wanted: Expected, dtype: Dtype, slack: float = 0.0) -> Parity:
    """Ask a program the same. Nothing is raised for what it gets wrong: see `Parity.fault`.

    slack: added to the bound of the number format, for a program that is known to compute less exactly.
    """
    size = wanted.largest_logit
    bound = (BOUNDS[dtype] + slack) * max(1.0, wanted.largest_distance)
    error, equal, faults = 0.0, 0, []
    for story in wanted.stories:
        tokens = [*story.prompt, *story.written][: len(story.logits)]
        found = runtime.logits(tokens)
        if found.shape != story.logits.shape or not np.isfinite(found).all():
            faults.append(f"its logits are of shape {found.shape}, or not finite")
            break
        error = max(error, float(np.abs(found - story.logits).max()))
        same, fault = _compare_written(story, runtime.write(story.prompt, len(story.written)), bound)
        equal += same
        faults += [fault] if fault else []
    if error > bound:
        faults.insert(0, f"its logits differ by up to {error:.3g}, and {bound:.3g} is allowed")
    wrong = [text for text, ids in wanted.ids.items() if runtime.encode(text) != ids]
    if wrong:
        faults.append(f"it has other ids for {visible(wrong[0])[:40]!r} and {len(wrong) - 1} more texts")
    ends = set(runtime.stop_ids)
    if not wanted.end_ids <= ends <= wanted.stop_ids:
        faults.append(f"a text ends at the tokens {sorted(ends)}, and {sorted(wanted.end_ids)} are expected")
    return Parity(
        by=runtime.name,
        largest_logit_error=error,
        largest_logit=size,
        bound=bound,
        greedy_tokens=sum(len(story.written) for story in wanted.stories),
        greedy_tokens_equal=equal,
        texts=len(wanted.ids),
        texts_with_equal_ids=len(wanted.ids) - len(wrong),
        fault=faults[0] if faults else "",
    )


def _compare_written(story: Story, found: Sequence[int], bound: float) -> tuple[int, str]:
    """How many tokens are equal, and what is wrong with the first that is not: two logits that are so near one another
    that the bound allows them to change places are no fault."""
    for place, (ours, theirs) in enumerate(zip(story.written, found)):
        if ours != theirs:
            logits = story.logits[len(story.prompt) + place - 1]
            margin = float(logits[ours] - logits[theirs])
            if margin <= 2 * bound:
                return place, ""
            return place, f"greedy token {place + 1} after a prompt is {theirs}, and {ours} is expected"
    if len(found) < len(story.written):
        return len(found), f"it wrote {len(found)} greedy tokens, and {len(story.written)} are expected"
    return len(story.written), ""


def require(found: Sequence[Parity], what: str) -> None:
    """Raises: ParityError when one of them has a fault."""
    for parity in found:
        if parity.fault:
            raise ParityError(f"{what} was not written: in {parity.by} {parity.fault}")
