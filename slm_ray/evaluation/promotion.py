"""A registered version becomes the champion only if it is better beyond doubt.

In: a registered version, a data set. Out: the alias `champion` on it, or `challenger` with the reason as a tag. Both
models are measured on the same stories of a held-out split, and the difference is paired by story; besides, the serving
backend has to give the logits of the trained model.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from slm_ray.config.measures import Split
from slm_ray.config.mixtures import named_data
from slm_ray.dataset.manifest import data_sets, load_manifest
from slm_ray.errors import UserError, visible
from slm_ray.evaluation.comparison import PairedDifference
from slm_ray.evaluation.losses import InfiniteLossError, StoryLosses
from slm_ray.evaluation.measurement import Data, Measurement, Subject, difference, finite, measure
from slm_ray.generation.backend_choice import make_backend
from slm_ray.generation.golden import BrokenModelError, compare_with_torch
from slm_ray.model_files.reading import BrokenWeightsError
from slm_ray.runs.checkpoint import load_model, load_state
from slm_ray.tracking import aliases
from slm_ray.tracking.evaluation_runs import record_evaluation
from slm_ray.tracking.mlflow_runs import resolve_uri
from slm_ray.tracking.registry import REGISTERED, RegistryError, ResolvedModel, resolved_model

MAX_ROUNDS = 5
"""How often the champion may change while a candidate is measured."""
MAX_NAMED = 8
"""Data sets of a mixture that a reason names."""
SHORT = 12
"""Digits of a fingerprint in a sentence."""
Compare = Callable[[ResolvedModel, ResolvedModel], PairedDifference]
"""Bits per byte of the first model less those of the second, on the same held-out stories."""
Describe = Callable[[ResolvedModel, ResolvedModel], str]
"""On which stories these two were compared, in words."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Promotion:
    """What came of a promotion."""

    name: str
    version: str
    is_champion: bool
    """Whether the version is the champion now; else it is the challenger."""
    instead_of: str
    """The champion that it was compared with, or where there was none the last one; empty where there never was."""
    reason: str
    """One line, also a tag of the version."""
    difference: PairedDifference | None = None

    def to_record(self) -> dict[str, Any]:
        """Plain values for JSON, which knows no infinity."""
        paired = dataclasses.asdict(self.difference) if self.difference else {}
        return dataclasses.asdict(self) | {
            "difference": {name: finite(value) for name, value in paired.items()} or None
        }

    def __str__(self) -> str:
        """One line for a terminal."""
        alias = aliases.CHAMPION if self.is_champion else aliases.CHALLENGER
        return f"{self.name} version {self.version} is the {alias} now: {self.reason}"


class StoryJudge:
    """Measures models on the stories of one split, each model once."""

    def __init__(self, data: Data) -> None:
        self._data = data
        self._measured: dict[str, Measurement] = {}

    def measured(self, model: ResolvedModel) -> Measurement:
        """Raises: UserError when the model cannot be read, or its loss is not finite."""
        if model.identity not in self._measured:
            decoder, tokenizer = load_model(model.path)
            subject = Subject(name=f"{model.name} {model.version}", model=decoder, tokenizer=tokenizer)
            self._measured[model.identity] = measure(subject, self._data)
        return self._measured[model.identity]

    def compare(self, candidate: ResolvedModel, champion: ResolvedModel) -> PairedDifference:
        """See `Compare`; two tokenizers are compared by the same texts. Raises: as `measured` of the candidate.

        A champion whose loss or weights are not finite, as of one that was the first of its name, is infinitely worse.
        """
        own = self.measured(candidate)
        try:
            return difference(own, self.measured(champion))
        except (InfiniteLossError, BrokenWeightsError):
            worst = -math.inf
            return PairedDifference(mean=worst, standard_error=0.0, low=worst, high=worst, n_stories=own.n_stories)

    def describe(self, candidate: ResolvedModel, champion: ResolvedModel) -> str:
        """See `Describe`: the split and its data sets, of a mixture with the difference on each; and where the champion
        was trained on other data than the candidate, that it was."""
        names = [name for name, _, _ in self._data.parts(self._data.split)]
        of_each = self._of_each(candidate, champion) if len(names) > 1 else names
        more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
        said = f" of the {self._data.split} split of {', '.join(of_each[:MAX_NAMED])}{more}, the same for both"
        if candidate.data_fingerprint == champion.data_fingerprint:
            return said
        name = named_data(str(load_state(champion.path).config.get("data", "")))
        other = f"{name} (data set {champion.data_fingerprint[:SHORT]})".lstrip()
        return f"{said}; version {champion.version} was trained on other data, {visible(other)}"

    def _of_each(self, candidate: ResolvedModel, champion: ResolvedModel) -> list[str]:
        """The data sets of a mixture with the difference of bits per byte on each, where there is a finite one."""
        own = self._data.by_data_set(self._losses(candidate))
        try:
            its = self._data.by_data_set(self._losses(champion))
        except (InfiniteLossError, BrokenWeightsError):
            return [name for name, _, _ in own]
        return [
            f"{name} ({first.bits_per_byte - second.bits_per_byte:+.4f})"
            for (name, _, first), (_, _, second) in zip(own, its)
        ]

    def _losses(self, model: ResolvedModel) -> StoryLosses:
        measured = self.measured(model).stories
        assert measured is not None  # this is how they are measured
        return measured.losses


def held_out_split(folder: str) -> Split:
    """The split that no training has seen and no choice hung on: test, or validation where it has no stories.

    Of a mixture test too only where no data set has stories in validation alone: both splits stand for the same data.
    """
    sets = [manifest.splits for _, manifest in data_sets(folder, load_manifest(folder))]
    is_whole = all(splits["test"].rows or not splits["validation"].rows for splits in sets)
    return "test" if is_whole and any(splits["test"].rows for splits in sets) else "validation"


def promote_on(reference: str, folder: str, split: Split, tracking_uri: str = "") -> Promotion:
    """As `promote`, on the stories of a data set or of all of a mixture; the evaluation is kept as a run of MLflow and
    as the version's tags.

    Raises:
        UserError: as `promote`; there is no such data set, or the split has no stories.
    """
    data = Data.open(folder, split)
    judge = StoryJudge(data)

    def keep(candidate: ResolvedModel, found: Promotion) -> None:
        try:
            figures = judge.measured(candidate).summary() | {"promotion": found.reason}
        except BrokenWeightsError:  # which is the reason, a tag of the version; of no number is nothing to be recorded
            return
        record_evaluation(resolve_uri(tracking_uri), candidate, figures, data.manifest, folder)

    return promote(reference, judge.compare, tracking_uri, keep, judge.describe)


def promote(
    reference: str,
    compare: Compare,
    tracking_uri: str = "",
    keep: Callable[[ResolvedModel, Promotion], None] | None = None,
    describe: Describe = lambda *_: "",
) -> Promotion:
    """Compare a registered version with the champion, and move an alias to it.

    The first version has nobody to be compared with; where the champion's alias was taken away, the last champion
    counts. A champion that changes meanwhile is compared with too. What came
    of it is given to `keep` while the candidate's files are there.

    Raises:
        RegistryError: the store does not answer; no alias was moved.
        UserError: the reference is no registered version, or one of the two models cannot be read.
    """
    uri = resolve_uri(tracking_uri)
    if not reference.startswith(REGISTERED):
        raise UserError(
            f"{reference} is no registered version: register it (train.py --register NAME), then promote it"
        )
    with resolved_model(reference, uri) as candidate:
        fault = _fault(candidate)
        for _ in range(MAX_ROUNDS):
            promotion = _try(candidate, fault, compare, uri, describe)
            if promotion is not None:
                if keep is not None:
                    keep(candidate, promotion)
                return promotion
    raise RegistryError(f"the champion of {candidate.name} changed {MAX_ROUNDS} times meanwhile: try again later")


def promote_first(reference: str, tracking_uri: str = "") -> Promotion | None:
    """Promote a registered version whose name has no champion yet; nothing where there is one. Raises: `promote`."""
    if aliases.CHAMPION in aliases.versions_by_alias(resolve_uri(tracking_uri), aliases.registered_name(reference)):
        return None
    return promote(reference, _unknown, tracking_uri)


def _unknown(_: ResolvedModel, champion: ResolvedModel) -> PairedDifference:
    """Another promotion was first: the difference is not known, so nothing is better beyond doubt."""
    del champion
    return PairedDifference(mean=math.nan, standard_error=math.nan, low=math.nan, high=math.nan, n_stories=0)


def _try(candidate: ResolvedModel, fault: str, compare: Compare, uri: str, describe: Describe) -> Promotion | None:
    """One comparison with the champion of now; nothing when another took its place before the alias moved."""
    name, version = candidate.name, candidate.version
    champion = aliases.versions_by_alias(uri, name).get(aliases.CHAMPION, "")
    if champion == version:
        return Promotion(name=name, version=version, is_champion=True, instead_of="", reason="it was so before")
    difference, where, rival = None, "", champion or aliases.version_to_beat(uri, name, version)
    if rival and not fault:
        with resolved_model(f"{REGISTERED}{name}/{rival}", uri) as other:
            difference, where = compare(candidate, other), describe(candidate, other)
    is_better, reason = _judge(fault, rival, difference)
    reason += where
    if rival and not champion and not is_better:
        reason += f"; nobody is champion now: --model {REGISTERED}{name}/{rival} --promote may change that"
    tags = {"promotion": "promoted" if is_better else "refused", "promotion_reason": reason}
    found = Promotion(
        name=name, version=version, is_champion=is_better, instead_of=rival, reason=reason, difference=difference
    )
    if not is_better:
        aliases.make_challenger(uri, name, version, tags)
        return found
    return found if aliases.make_champion(uri, name, version, instead_of=champion, tags=tags) == version else None


def _judge(fault: str, champion: str, difference: PairedDifference | None) -> tuple[bool, str]:
    """Whether a candidate is better, and why or why not."""
    if fault:
        return False, fault
    if difference is None:
        return True, "the first champion of this name"
    interval = f"[{difference.low:+.4f}, {difference.high:+.4f}]"
    figures = f"{difference.mean:+.4f} bits per byte against version {champion}, 95 % interval {interval}"
    figures += f", {difference.n_stories:,} stories"
    if difference.high < 0:
        return True, f"better: {figures}"
    return False, f"{'worse' if difference.low > 0 else 'not better beyond doubt'}: {figures}"


def _fault(candidate: ResolvedModel) -> str:
    """Why a version must not serve; empty when the serving backend gives the logits of the trained model."""
    try:
        model, tokenizer = load_model(candidate.path)
        found = compare_with_torch(model, tokenizer, make_backend(model, 1))
    except BrokenWeightsError as error:
        return f"{error.broken} holds numbers that are not finite"
    except BrokenModelError as error:
        return str(error)
    if found.is_equal:
        return ""
    return f"the serving backend's logits differ from the trained model's by up to {found.largest_error:.3g}"
