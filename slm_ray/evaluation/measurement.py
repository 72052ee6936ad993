"""One measurement of a model on a split, with everything that one has to know to do it again.

In: a reference to a model, a data-set folder, how to measure. Out: a `Measurement`, which says itself by which measure,
context and stride it was made, so that a changed evaluation never reads as learning. `evaluate.py` prints it; promotion
compares the losses in it.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from slm_ray.config.measures import Measure, Split
from slm_ray.dataset.licences import SAMPLE
from slm_ray.dataset.manifest import (
    TOKENIZER,
    Manifest,
    MixedManifest,
    data_sets,
    home_of,
    load_manifest,
    named_sets,
)
from slm_ray.dataset.shards import read_split
from slm_ray.dataset.stream import TokenStream
from slm_ray.errors import UserError
from slm_ray.evaluation.comparison import PairedDifference, bits_per_byte_error, compare, loss_error
from slm_ray.evaluation.losses import Measured, Row, StoryLosses, measure_stories
from slm_ray.evaluation.scoring import Scorer
from slm_ray.evaluation.stories import StoryBlock, encoded_anew, read_stories
from slm_ray.generation.backend_choice import BackendName, make_backend
from slm_ray.model.decoder import Decoder
from slm_ray.model.device import CPU, moved
from slm_ray.runs.train_state import Evaluation
from slm_ray.tokenization.tokenizer import Tokenizer
from slm_ray.tracking.registry import load_model, resolved_model
from slm_ray.training.context import TrainContext
from slm_ray.training.evaluation import bits_per_byte, evaluate_windows


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Subject:
    """A model that is measured, and its name."""

    name: str
    """Name and version, as `tinystories 3`."""
    model: Decoder
    tokenizer: Tokenizer
    is_foreign: bool = False
    """Whether it is no checkpoint of ours: then data is encoded in the tokens of its own tokenizer."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """The split that a model is measured on: of a mixture, the stories of all of its data sets, as training validates;
    the weights have no part in it."""

    folder: str
    """Or the mixture, as `A=0.7 B=0.3`."""
    manifest: Manifest
    split: Split

    @classmethod
    def open(cls, folder: str, split: Split) -> "Data":
        """Raises: UserError when there is no data set, or the split has no stories."""
        manifest = load_manifest(folder)
        if not manifest.splits[split].rows:
            raise UserError(f"{folder} has no stories in its {split} split")
        return cls(folder=folder, manifest=manifest, split=split)

    def tokenizer(self) -> Tokenizer:
        """Raises: UserError when it is missing, or not the one that the manifest lists."""
        path = home_of(self.folder) / TOKENIZER
        tokenizer = Tokenizer.load(path)
        if tokenizer.sha256 != self.manifest.tokenizer["sha256"]:
            raise UserError(f"{path} was altered since the data was prepared: prepare it again")
        return tokenizer

    def parts(self, split: Split) -> list[tuple[str, str, Manifest]]:
        """Name, folder and manifest of the data set; of a mixture, of each with stories in a split."""
        sets = zip(named_sets(self.folder, self.manifest), data_sets(self.folder, self.manifest))
        return [
            (name, str(folder), its)
            for (name, its, _), (folder, _) in sets
            if its is self.manifest or its.splits[split].rows
        ]

    @property
    def is_sample_corpus(self) -> bool:
        """Whether the stories are those that this project makes itself."""
        return all(its.source.get("used") == SAMPLE for _, its in data_sets(self.folder, self.manifest))

    def stories(self, split: Split | None = None) -> Iterator[StoryBlock]:
        """Those of its split, or of another one. In a mixture, where an id may be in two data sets, a number stands
        before it, as `2/tales#7`: that of its data set among those with stories there.

        Raises:
            UserError: as `read_stories`.
        """
        for number, (_, folder, its) in enumerate(self.parts(split or self.split), 1):
            for block in read_stories(folder, split or self.split, its):
                if its is not self.manifest:
                    block = dataclasses.replace(block, story_ids=[f"{number}/{one}" for one in block.story_ids])
                yield block

    def stream(self, eos_id: int) -> TokenStream:
        """The same as a stream of tokens. Raises: UserError as `read_split`."""
        found = [read_split(folder, self.split, manifest=its) for _, folder, its in self.parts(self.split)]
        streams = [TokenStream.of_split(tokens, n_bytes, eos_id) for tokens, n_bytes in found]
        return streams[0] if len(streams) == 1 else TokenStream.joined(streams)

    def by_data_set(self, losses: StoryLosses) -> list[tuple[str, Manifest, StoryLosses]]:
        """What of the losses of `stories` is of each data set, with its name."""
        parts = self.parts(self.split)
        number = np.repeat(np.arange(len(parts)), [its.splits[self.split].rows for _, _, its in parts])
        return [(name, its, losses.of(number == place)) for place, (name, _, its) in enumerate(parts)]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Measurement:
    """Loss of a model on a split, and how it was measured."""

    model: str
    split: Split
    backend: BackendName
    measure: Measure
    seq_len: int
    """Context in tokens."""
    stride: int
    """Tokens by which the next window of a longer story begins later; of the stream's windows, their length."""
    n_stories: int
    n_tokens: int
    n_bytes: int
    total: Evaluation
    data_fingerprint: str
    stories: Measured | None
    """Story by story; none by the windows of the stream."""
    by_data_set: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """Of a mixture, story by story: name and fingerprint of each data set, and the losses on its stories."""
    borders: str = ""
    """Of a model that others made: which tokens stood before and after each story, and which file says so."""

    def summary(self) -> dict[str, Any]:
        """The numbers, without tables, as plain values."""
        values: dict[str, Any] = {
            "model": self.model,
            "split": self.split,
            "backend": self.backend,
            "measure": self.measure,
            "seq_len": self.seq_len,
            "stride": self.stride,
            "stories": self.n_stories,
            "tokens": self.n_tokens,
            "bytes": self.n_bytes,
            "data_fingerprint": self.data_fingerprint,
            **({"borders": self.borders} if self.borders else {}),
            **{name.removeprefix("val_"): value for name, value in self.total.metrics.items()},
        }
        if self.stories is not None:
            losses = self.stories.losses
            values["loss_standard_error"] = finite(loss_error(losses))
            values["bits_per_byte_standard_error"] = finite(bits_per_byte_error(losses))
        return values

    def tables(self) -> dict[str, list[Row]]:
        """Loss by position, by length of story and by data set, where stories were measured."""
        if self.stories is None:
            return {}
        tables = {"by_position": self.stories.by_position, "by_length": self.stories.by_length}
        return tables | ({"by_data_set": self.by_data_set} if self.by_data_set else {})


def finite(value: float) -> float | None:
    """A number for JSON, which knows no infinity: none in its place."""
    return value if math.isfinite(value) else None


@contextlib.contextmanager
def subject(reference: str, tracking_uri: str = "", device: torch.device = CPU) -> Iterator[Subject]:
    """Open a model by its reference, which may be of a model that others made, on a device for the length of a block.

    Raises:
        UserError: there is no such model, or it is corrupt, or of an architecture that is not known.
    """
    with resolved_model(reference, tracking_uri) as found:
        model, tokenizer = load_model(found)
        name = f"{found.name} {found.version}"
        yield Subject(name=name, model=moved(model, device), tokenizer=tokenizer, is_foreign=found.is_foreign)


def default_threads() -> int:
    """Threads that compute where nobody says how many."""
    return torch.get_num_threads()


def check_tokenizer(found: Subject, data: Data) -> None:
    """Raises: UserError when the data was prepared with another tokenizer than the model's."""
    if found.tokenizer.sha256 != data.manifest.tokenizer["sha256"]:
        raise UserError(
            f"{data.folder} was prepared with another tokenizer than {found.name}'s: pass its own data with --data"
        )


def measure(found: Subject, data: Data, *, by: Measure = "stories", backend: BackendName = "torch") -> Measurement:
    """Measure a model on a split in the tokens of its own tokenizer, into which other data is encoded anew.

    Raises:
        UserError: the backend cannot run the model, a shard is damaged, or the loss is not finite.
    """
    if by == "windows":
        return _by_windows(found, data, backend)
    scorer = _scorer(found.model, backend)
    measured = measure_stories(scorer, _in_tokens_of(found.tokenizer, data), found.tokenizer.start_id)
    losses = measured.losses
    n_tokens, n_bytes = int(losses.n_tokens.sum()), int(losses.n_bytes.sum())
    return Measurement(
        model=found.name,
        split=data.split,
        backend=backend,
        measure="stories",
        seq_len=scorer.seq_len,
        stride=scorer.stride,
        n_stories=len(losses.story_ids),
        n_tokens=n_tokens,
        n_bytes=n_bytes,
        total=Evaluation.of_nats(
            losses.total_nats, n_tokens, n_bytes, measure="stories", context=scorer.seq_len, stride=scorer.stride
        ),
        data_fingerprint=data.manifest.fingerprint,
        stories=measured,
        by_data_set=_by_data_set(data, losses),
        borders=found.tokenizer.borders.origin,
    )


def _by_data_set(data: Data, losses: StoryLosses) -> list[dict[str, Any]]:
    found = data.by_data_set(losses) if isinstance(data.manifest, MixedManifest) else []
    return [{"data_set": name, "fingerprint": its.fingerprint} | part.row() for name, its, part in found]


def _scorer(model: Decoder, backend: BackendName) -> Scorer:
    return Scorer.of_model(model) if backend == "torch" else Scorer.of_backend(make_backend(model, 1, backend))


def _in_tokens_of(tokenizer: Tokenizer, data: Data) -> Iterator[StoryBlock]:
    if tokenizer.sha256 == data.manifest.tokenizer["sha256"]:
        yield from data.stories()
        return
    own = data.tokenizer()
    for block in data.stories():
        yield encoded_anew(block, own, tokenizer)


def _by_windows(found: Subject, data: Data, backend: BackendName) -> Measurement:
    check_tokenizer(found, data)
    stream = data.stream(found.tokenizer.eos_id)
    seq_len = found.model.config.seq_len
    if backend == "torch":
        context = TrainContext(device=next(found.model.parameters()).device)
        total = evaluate_windows(found.model, stream, seq_len=seq_len, context=context)
    else:
        bits = bits_per_byte(make_backend(found.model, 1, backend), stream)
        nats, way = bits * math.log(2) * stream.n_bytes, {"context": seq_len, "stride": seq_len}
        total = Evaluation.of_nats(nats, stream.n_targets, stream.n_bytes, measure="windows", **way)
    if not math.isfinite(total.val_loss):
        raise UserError(f"the loss of {found.name} is not finite: the model diverged in training")
    return Measurement(
        model=found.name,
        split=data.split,
        backend=backend,
        measure="windows",
        seq_len=seq_len,
        stride=seq_len,
        n_stories=data.manifest.splits[data.split].rows,
        n_tokens=stream.n_targets,
        n_bytes=stream.n_bytes,
        total=total,
        data_fingerprint=data.manifest.fingerprint,
        stories=None,
    )


def difference(first: Measurement, second: Measurement) -> PairedDifference:
    """Bits per byte of the first less that of the second, paired by story.

    Raises:
        UserError: they were not measured by story, or not on the same stories.
    """
    if first.stories is None or second.stories is None:
        raise UserError("two models are compared story by story: measure them with --measure stories")
    return compare(first.stories.losses, second.stories.losses)
