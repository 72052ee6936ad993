"""Where a model comes from, and which stories a step of its run saw: `evaluate.py --explain`.

In: a checkpoint, folder or registered version; for a step, the data set. Out: a `Lineage`, and the `StepStories` of a
step, both out of `state.json`, manifest and shards alone: no record of MLflow is needed, and no number of workers.
`explain` prints them.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slm_ray.config.files import DEFAULT_PRESET, flatten, load_config, presets
from slm_ray.config.places import ADDRESSES, LISTS, origin_name
from slm_ray.config.schema import PackingName, TrainConfig
from slm_ray.dataset.manifest import TOKENIZER, Manifest, data_sets, fingerprint, home_of, load_manifest
from slm_ray.dataset.provenance import SourceRow, source_row
from slm_ray.dataset.shards import checked_content
from slm_ray.dataset.windows import StoryPart
from slm_ray.errors import UserError
from slm_ray.lineage.step_samples import Taken
from slm_ray.runs import checkpoint, verification
from slm_ray.runs.train_state import Attempt, TrainState
from slm_ray.tokenization.tokenizer import Tokenizer
from slm_ray.tracking.aliases import aliases_of
from slm_ray.tracking.registry import REGISTERED, resolved_model

NO_MATTER = frozenset({*ADDRESSES, "name", "resume", "force", "workers", "model.vocab_size", "experiment", "register"})
"""Fields of a config that say where and by whom a run was made, or that follow from the data set."""

SHORT = 12
"""Digits of a fingerprint in a sentence."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lineage:
    """The chain that leads to a model."""

    reference: str
    """As it was given."""
    name: str
    """Of the registered model, or of the run where it is a folder."""
    version: str
    """Number of the registered version; empty for a folder."""
    aliases: tuple[str, ...]
    """That lead to the version now."""
    run_id: str
    """Of the tracked run, empty without one."""
    state: TrainState
    """Of the checkpoint."""
    attempts: tuple[Attempt, ...]
    """Of its run, the first at step 0."""
    preset: str
    """The preset that its config is nearest to."""
    differences: dict[str, tuple[Any, Any]]
    """Fields that differ from it, by their dotted names: the preset's value, and the run's."""
    tokenizer_sha256: str
    weights_sha256: str

    def attempt_of(self, step: int) -> tuple[int, Attempt]:
        """The attempt that made a step (from 1), with its number.

        Raises:
            UserError: the checkpoint is not of so many steps.
        """
        if not 1 <= step <= self.state.step:
            raise UserError(f"step ({step}) must be from 1 to {self.state.step}, the last of {self.reference}'s run")
        number = max(at for at, attempt in enumerate(self.attempts) if attempt.step < step)
        return number + 1, self.attempts[number]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """What a window has of a story."""

    part: StoryPart
    source: SourceRow
    text: str
    """Of the tokens that the window has."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Window:
    """One sample of a step."""

    number: int
    """Of windows in the order of the split's text, of whole stories as they are packed; from 0."""
    epoch: int
    """Of its data set, from 0."""
    data: str
    """Folder of its data set."""
    pieces: tuple[Piece, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepStories:
    """The batch of one step."""

    step: int
    """From 1: the step after which a checkpoint is called `step-1`."""
    attempt: int
    """From 1."""
    data: str
    """Where the data set lies."""
    made_by: Attempt
    seq_len: int
    packing: PackingName
    windows: tuple[Window, ...]
    """In the global order of the batch; workers share it out in equal parts."""


def trace(reference: str, tracking_uri: str = "") -> Lineage:
    """The chain of a model, once every file of its checkpoint was found to be what was written.

    Raises:
        RegistryError: there is no such model, or the store does not answer.
        UserError: it is no checkpoint, is corrupt, or does not say how its run went.
    """
    with resolved_model(reference, tracking_uri) as found:
        if found.is_foreign:
            raise UserError(
                f"{reference} is a model without {verification.STATE}, which says where it comes from: give the "
                "checkpoint, or the registered version, that it was exported from"
            )
        verification.verify(found.path)
        state = checkpoint.load_state(found.path)
        is_registered = reference.startswith(REGISTERED)
        preset, differences = _nearest_preset(state.config)
        return Lineage(
            reference=reference,
            name=found.name,
            version=found.version if is_registered else "",
            aliases=aliases_of(found.name, found.version, tracking_uri) if is_registered else (),
            run_id=found.run_id or state.run_id,
            state=state,
            attempts=_attempts(state, reference),
            preset=preset,
            differences=differences,
            tokenizer_sha256=_digest(found.path, "tokenizer.json"),
            weights_sha256=_digest(found.path, "model.safetensors"),
        )


def _digest(folder: Path, name: str) -> str:
    return verification.file_digest(folder, f"{checkpoint.MODEL}/{name}")


def _attempts(state: TrainState, reference: str) -> tuple[Attempt, ...]:
    try:
        attempts = tuple(state.known_attempts)
    except ValueError as error:
        raise UserError(f"{reference} does not say how it was trained: {error} in {verification.STATE}") from error
    steps = [attempt.step for attempt in attempts]
    if any(attempt.batch_size < 1 for attempt in attempts):
        raise UserError(f"{reference}: a batch size in {verification.STATE} is below 1")
    if steps[0] != 0 or steps != sorted(steps) or steps[-1] > state.step:
        raise UserError(f"{reference}: the attempts in {verification.STATE} do not follow one another: {steps}")
    return attempts


def _nearest_preset(config: Mapping[str, Any]) -> tuple[str, dict[str, tuple[Any, Any]]]:
    """The preset with the fewest other fields, the default one where several are, and these fields."""
    own = {name: value for name, value in _comparable(config).items() if name not in NO_MATTER}
    found: dict[str, dict[str, tuple[Any, Any]]] = {}
    for preset in sorted(presets(), key=lambda name: name != DEFAULT_PRESET):
        theirs = _comparable(dataclasses.asdict(load_config(preset)))
        found[preset] = {name: (theirs.get(name), value) for name, value in own.items() if theirs.get(name) != value}
    nearest = min(found, key=lambda preset: len(found[preset]))
    return nearest, found[nearest]


def _comparable(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields by their dotted names; of several places, which may come from JSON, the names that others may see."""
    fields = flatten(config)
    return fields | {name: [origin_name(str(one)) for one in fields[name]] for name in LISTS if name in fields}


def stories_of_step(lineage: Lineage, step: int, data: str = "") -> StepStories:
    """The stories that a step of the run saw, by the order contract of `dataset.batches`.

    data: the data set that the step was trained on; when not given, the folder that the run was given.

    Raises:
        UserError: the run has no such step, the folder is another data set or not what its manifest lists, or the
            checkpoint does not say how the samples were drawn.
    """
    number, made_by = lineage.attempt_of(step)
    seq_len = _seq_len(lineage)
    _check_samples(lineage)
    folder = data or _place_of_data(lineage, made_by)
    manifest = load_manifest(folder)
    _check_data(lineage, made_by, folder, manifest)
    packing: PackingName = lineage.state.config.get("packing", "windows")
    tokenizer = _tokenizer(folder, manifest)
    taken = Taken(
        data=folder,
        manifest=manifest,
        seq_len=seq_len,
        packing=packing,
        batch_size=made_by.batch_size,
        seed=made_by.seed,
    )
    windows = [
        Window(
            number=sample.number,
            epoch=sample.epoch,
            data=sample.folder,
            pieces=tuple(
                Piece(part=part, source=source_row(sample.manifest, part.story_id), text=tokenizer.decode(part.ids))
                for part in sample.parts
            ),
        )
        for sample in taken.at(step)
    ]
    return StepStories(
        step=step,
        attempt=number,
        data=folder,
        made_by=made_by,
        seq_len=seq_len,
        packing=packing,
        windows=tuple(windows),
    )


def _seq_len(lineage: Lineage) -> int:
    seq_len = (lineage.state.config.get("model") or {}).get("seq_len")
    if not isinstance(seq_len, int) or seq_len < 1:
        raise UserError(f"{lineage.reference} does not say how long its samples were: no config.model.seq_len")
    return seq_len


def _check_samples(lineage: Lineage) -> None:
    """What the attempts took must be what was counted: files of earlier versions keep the last batch size alone."""
    state, ends = lineage.state, [attempt.step for attempt in lineage.attempts[1:]]
    taken = sum(
        (end - attempt.step) * attempt.batch_size
        for attempt, end in zip(lineage.attempts, [*ends, state.step], strict=True)
    )
    if taken != state.samples_seen:
        raise UserError(
            f"{lineage.reference} saw {state.samples_seen:,} samples, and its record accounts for {taken:,}: its batch "
            "size was changed on the way, and the version that wrote it did not say when"
        )


def _place_of_data(lineage: Lineage, made_by: Attempt) -> str:
    """Where the data set is: where the run found its last one, or where one lies by default."""
    wanted, tried = made_by.data_fingerprint, []
    for place in dict.fromkeys((str(lineage.state.config.get("data") or TrainConfig.data), TrainConfig.data)):
        try:
            found = load_manifest(place).fingerprint
        except UserError as error:
            tried.append(str(error))
        else:
            if found == wanted:
                return place
            tried.append(f"{place} is data set {found[:SHORT]}")
    raise UserError(
        f"the step was trained on data set {wanted[:SHORT]}, and {'; '.join(tried)}: name its folder with --data"
    )


def _check_data(lineage: Lineage, made_by: Attempt, folder: str, manifest: Manifest) -> None:
    wanted = made_by.data_fingerprint
    if manifest.fingerprint != wanted:
        since = "" if len(lineage.attempts) == 1 else f" from step {made_by.step + 1:,} on"
        raise UserError(
            f"{folder} is data set {manifest.fingerprint[:SHORT]}, and the step was trained on {wanted[:SHORT]}"
            f"{since}: name the folder of that one with --data"
        )
    for place, one in data_sets(folder, manifest):
        _check_fingerprint(str(place), one)


def _check_fingerprint(folder: str, manifest: Manifest) -> None:
    source, wanted = str(manifest.source.get("digest", "")), manifest.fingerprint
    content = {"parameters": manifest.parameters, "tokenizer_sha256": manifest.tokenizer["sha256"]}
    if fingerprint(source_digest=source, splits=manifest.splits, **content) != wanted:
        raise UserError(
            f"{folder} has the fingerprint of the step's data set and other shards or parameters than it: its "
            "manifest.json was altered, prepare the data again"
        )


def _tokenizer(folder: str, manifest: Manifest) -> Tokenizer:
    path = home_of(folder) / TOKENIZER
    return Tokenizer.from_json(checked_content(path, manifest.tokenizer["sha256"]).decode("utf-8"), str(path))
