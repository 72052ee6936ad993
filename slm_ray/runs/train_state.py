"""Where a run stands, as `state.json` of a checkpoint keeps it.

In: the loop's counters, its last and best validation. Out: plain values, and back; files of before are read too.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, get_args

from pydantic import TypeAdapter, ValidationError

from slm_ray.config.mixtures import DataShare
from slm_ray.config.places import saved_config
from slm_ray.config.resuming import with_earlier_defaults
from slm_ray.config.schema import MeasureName
from slm_ray.runs.code_version import CodeVersion

RENAMED_FIELDS = {"n_unimproved": "n_stale_validations"}
"""Fields of `state.json` under the names that earlier versions wrote."""
_LOSSES = ("val_loss", "val_perplexity", "val_bits_per_byte")
HOW_MEASURED = ("val_measure", "val_context", "val_stride")
"""Of an evaluation, what must be equal for its losses to be compared with others."""
MAX_ORIGINS = 32
"""Links of the chain that a state keeps, the nearest first: what is beyond is not kept, and so not known."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Loss of a model over a whole split, each target once."""

    val_loss: float
    """Nats a token."""
    val_perplexity: float = math.nan
    """exp(val_loss)."""
    val_bits_per_byte: float = math.nan
    """Nats of all targets / ln 2 / UTF-8 bytes of the stories."""
    val_measure: MeasureName = "windows"
    """By which measure; that of files of earlier versions, which do not say it."""
    val_context: int = 0
    """Tokens that the model saw at once, the target's own included; 0 where that is not known."""
    val_stride: int = 0
    """Tokens by which the next window begins later; 0 where that is not known."""
    step: int = 0
    """Optimizer steps of the model, where it is one of a run."""

    @classmethod
    def of_nats(
        cls, nats: float, n_tokens: float, n_bytes: int, *, measure: MeasureName, context: int, stride: int
    ) -> "Evaluation":
        """Out of the summed loss of all targets."""
        loss = nats / n_tokens
        return cls(
            val_loss=loss,
            val_perplexity=math.exp(min(loss, 700.0)),
            val_bits_per_byte=nats / math.log(2) / n_bytes,
            val_measure=measure,
            val_context=context,
            val_stride=stride,
        )

    @property
    def metrics(self) -> dict[str, float]:
        """The losses by their names; one that the checkpoint was written without is left out."""
        values = {name: getattr(self, name) for name in _LOSSES}
        return {name: value for name, value in values.items() if not math.isnan(value)}

    @property
    def record(self) -> dict[str, Any]:
        """The losses and how they were measured, without the step."""
        return self.metrics | {name: getattr(self, name) for name in HOW_MEASURED}

    def is_like(self, other: "Evaluation") -> bool:
        """Whether both were measured in one way, so that their losses can be compared; what is not known may be."""
        ways = [(getattr(self, name), getattr(other, name)) for name in HOW_MEASURED]
        return all(own == its or 0 in (own, its) for own, its in ways)

    def is_better_than(self, other: "Evaluation | None") -> bool:
        """Whether its loss is lower; any loss is lower than none, or than one that was measured in another way."""
        return other is None or not self.is_like(other) or self.val_loss < other.val_loss

    @classmethod
    def from_record(cls, record: Mapping[str, Any], step: float = 0) -> "Evaluation | None":
        """What `record` gave, perhaps with a `step`; an empty record is no evaluation.

        Raises:
            TypeError: a loss is no number.
            ValueError: there is no such measure.
        """
        if not record:
            return None
        measure = record.get("val_measure", "windows")
        if measure not in get_args(MeasureName):
            raise ValueError(f"val_measure is {measure!r:.40}")
        losses: dict[str, Any] = {name: float(record[name]) for name in _LOSSES if name in record}
        sizes = {name: int(record.get(name, 0)) for name in ("val_context", "val_stride")}
        return cls(**losses, **sizes, val_measure=measure, step=int(record.get("step", step)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attempt:
    """One stretch of a run, from its start or a checkpoint on. What its steps saw follows from it."""

    step: int
    """Optimizer steps done before it."""
    data_fingerprint: str
    """Which data set."""
    seed: int
    """Of the order of its samples."""
    batch_size: int
    """Samples a step."""
    world_size: int
    """Workers; 0 where that is not known."""
    code_version: CodeVersion | None = None
    """Which code, where that is known."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Origin:
    """The model whose weights a run began with, by names that mean something elsewhere too."""

    reference: str
    """`models:/NAME/3`, `hub:OWNER/NAME@COMMIT`, `RUN/step-00000400`, or the last name of a folder."""
    weights_sha256: str
    """Of its `model.safetensors`, or of the names and digests of all its shards."""
    step: int = 0
    """Optimizer steps that it had, where it is one of ours."""
    run_id: str = ""
    """Run of the tracker that it came out of, where it is one of ours."""
    lineage: list[tuple[str, int]] = dataclasses.field(default_factory=list)
    """Data sets that it was trained on, as `TrainState.lineage`; empty where others made it."""
    mixtures: dict[str, list[DataShare]] = dataclasses.field(default_factory=dict)
    """As `TrainState.mixtures`."""
    changes: list[str] = dataclasses.field(default_factory=list)
    """What was changed in it before the first step, in words: rows of the embedding, the context."""
    origin: "Origin | None" = None
    """What it began from itself; None where that was random weights, or is not known."""
    is_start_known: bool = False
    """Whether `origin` and `teachers` are all: not of a model of others, of an earlier version, or at a cut."""
    teachers: "list[Origin]" = dataclasses.field(default_factory=list)
    """Models that it learned from besides its stories, in their order."""

    @property
    def chain(self) -> list["Origin"]:
        """It and all before it, the nearest first; at least one."""
        return [self, *(self.origin.chain if self.origin else [])]

    @property
    def every(self) -> list["Origin"]:
        """It, all before it and the teachers of each, the nearest first."""
        found = [self]
        for link in found:  # which grows
            found += [*link.teachers, *([link.origin] if link.origin else [])]
        return found

    @property
    def is_of_others(self) -> bool:
        """Whether others made it: a model of ours knows the data sets that it saw."""
        return not self.lineage

    @property
    def is_ours(self) -> bool:
        """Whether every link and teacher is known and ours, down to those that began with random weights."""
        return all(not link.is_of_others and link.is_start_known for link in self.every)

    def shortened(self) -> "Origin":
        """The nearest links and teachers, at most `MAX_ORIGINS`; of what came before a cut, nothing is known."""
        cuts = (self.kept_to(links) for links in range(MAX_ORIGINS, 0, -1))
        return next(cut for cut in cuts if len(cut.every) <= MAX_ORIGINS)

    def kept_to(self, links: int) -> "Origin":
        """What is at most so many links away."""
        if self.origin is None and not self.teachers:
            return self
        if links <= 1:
            return dataclasses.replace(self, origin=None, teachers=[], is_start_known=False)
        origin = self.origin.kept_to(links - 1) if self.origin else None
        return dataclasses.replace(self, origin=origin, teachers=[one.kept_to(links - 1) for one in self.teachers])


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
    """Where a run stands; together with weights and optimizer all that resuming needs."""

    step: int
    """Optimizer steps done."""
    samples_seen: int
    """Training samples seen: step x global batch."""
    seed: int
    """Seed of weights, order and dropout."""
    world_size: int
    """Workers at the time of writing; a resumed run may have another number."""
    data_fingerprint: str
    """Which data set."""
    config: dict[str, Any]
    """The whole `TrainConfig`, vocabulary size resolved."""
    metrics: Evaluation | None
    """The validation at this step; none where the run was asked to stop between two."""
    best: Evaluation | None = None
    """The best validation so far."""
    n_stale_validations: int = 0
    """Validations since then."""
    run_id: str = ""
    """Run of the tracker, empty without one."""
    scaler: dict[str, Any] = dataclasses.field(default_factory=dict)
    """State of the loss scaling, empty unless in fp16."""
    tokens_seen: int | None = None
    """Targets trained on; None in files of earlier versions, whose samples were all full."""
    pending_losses: list[float] = dataclasses.field(default_factory=list)
    """Of each rank, the sum of the losses of the steps since the last line of metrics."""
    pending_steps: int = 0
    """How many steps these are: 0 unless the run was asked to stop between two lines."""
    lineage: list[tuple[str, int]] = dataclasses.field(default_factory=list)
    """Each data set that the run was trained on, by fingerprint, and from which step; empty in files of before."""
    mixtures: dict[str, list[DataShare]] = dataclasses.field(default_factory=dict)
    """The data sets of each mixture among them, by its fingerprint; empty in files of before."""
    attempts: list[Attempt] = dataclasses.field(default_factory=list)
    """Those that led here, the first at step 0; empty in files of before. One without a checkpoint led nowhere."""
    origin: Origin | None = None
    """Of a run that began with given weights."""
    teachers: list[Origin] = dataclasses.field(default_factory=list)
    """Of a run with teachers: which weights these have, in their order."""

    @property
    def are_teachers_known(self) -> bool:
        """Whether `teachers` are all that its config names."""
        named = self.config.get("teacher", ())
        return isinstance(named, list | tuple) and len(self.teachers) >= len(named)

    @property
    def is_ours(self) -> bool:
        """Whether all that it began from and learned from is known and ours."""
        return self.are_teachers_known and all(one is None or one.is_ours for one in (self.origin, *self.teachers))

    @property
    def known_attempts(self) -> list[Attempt]:
        """`attempts`, or what is known of them: the data sets. Raises: ValueError when the config has no batch size."""
        if self.attempts:
            return self.attempts
        batch_size = self.config.get("batch_size")
        if not isinstance(batch_size, int):
            raise ValueError("config.batch_size is missing")
        return [
            Attempt(step=step, data_fingerprint=data, seed=self.seed, batch_size=batch_size, world_size=0)
            for data, step in self.data_lineage
        ]

    @property
    def data_lineage(self) -> list[tuple[str, int]]:
        """`lineage`, or the one data set that is known."""
        return self.lineage or [(self.data_fingerprint, 0)]

    def lineage_with(self, data_fingerprint: str) -> list[tuple[str, int]]:
        """The lineage of a run that goes on from here on a data set, the same or another."""
        known = self.data_lineage
        return known if known[-1][0] == data_fingerprint else [*known, (data_fingerprint, self.step)]

    def to_record(self) -> dict[str, Any]:
        """Plain values for JSON; no password is among them."""
        best = {"step": self.best.step, **self.best.record} if self.best else {}
        fields = _as_before(dataclasses.asdict(self) | {"config": saved_config(self.config)})
        fields = {name: value for name, value in fields.items() if name != "origin" or value}
        return fields | {"metrics": self.metrics.record if self.metrics else {}, "best": best}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "TrainState":
        """What `to_record` gave, of this or an earlier version. Raises: ValueError."""
        try:
            fields = {RENAMED_FIELDS.get(name, name): value for name, value in record.items()}
            fields["metrics"] = Evaluation.from_record(fields["metrics"], fields["step"])
            fields["best"] = Evaluation.from_record(fields.get("best", {}))
            fields["config"] = with_earlier_defaults(fields["config"])
            fields["lineage"] = [(str(data), int(step)) for data, step in fields.get("lineage", [])]
            cls(**fields)  # refuses names that there are not
            for one in (fields.get("origin"), *fields.get("teachers", [])):
                _check_chain(one)
            return TypeAdapter(cls).validate_python(fields)
        except ValidationError as error:
            first = error.errors()[0]
            raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
        except KeyError as error:
            raise ValueError(f"{error.args[0]} is missing") from error
        except (TypeError, AttributeError, OverflowError) as error:
            raise ValueError(str(error)) from error


def _check_chain(record: Any) -> None:
    """Raises: ValueError for more links than any version writes."""
    found = [record] if isinstance(record, Mapping) else []
    for link in found:  # which grows meanwhile
        found += [one for one in (link.get("origin"), *link.get("teachers", [])) if isinstance(one, Mapping)]
    if len(found) > MAX_ORIGINS:
        raise ValueError(f"origin: a chain of {len(found)} models, and {MAX_ORIGINS} are read")


def _as_before(record: dict[str, Any]) -> dict[str, Any]:
    """A state's or an origin's fields without empty ones that files of earlier versions have not."""
    kept = {name: value for name, value in record.items() if value or name not in ("teachers", "mixtures")}
    links = {"origin": _as_before(kept["origin"])} if kept.get("origin") else {}
    return kept | links | ({"teachers": [_as_before(one) for one in kept["teachers"]]} if "teachers" in kept else {})
