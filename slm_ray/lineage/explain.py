"""`evaluate.py --explain MODEL [--step N]`: where a model comes from, as text or as one JSON object.

In: options. Out: what `lineage` finds, as text in which no character of a story acts on a terminal, or as JSON.
"""

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from slm_ray.config.options import parse
from slm_ray.errors import UserError, visible
from slm_ray.runs.train_state import Attempt, Origin

if TYPE_CHECKING:  # with torch, which `--help` need not wait for
    from slm_ray.lineage.chain import Lineage, Piece, StepStories

OPTION = "--explain"
SHORT = 12
"""Letters of a digest that are shown."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExplainConfig:
    """Say where a model comes from; with --step, which stories that step of its run saw."""

    explain: str = ""
    """Registered model (models:/NAME@ALIAS or models:/NAME/VERSION) or folder of a checkpoint."""
    step: int | None = None
    """Step of the run, from 1 up to the model's: name the stories of its batch."""
    data: str = ""
    """Folder of the data set that the step was trained on; where the run found it, or data/tinystories, when not
    given."""
    json: bool = False
    """One JSON object in place of text."""
    tracking_uri: str = ""
    """MLflow store of registered models; MLFLOW_TRACKING_URI or sqlite:///mlflow.db when not given."""

    def __post_init__(self) -> None:
        if self.data and self.step is None:
            raise ValueError("data is where the stories of a step lie: name a step")


def explanation(argv: Sequence[str] | None) -> str | None:
    """What a command line with `--explain` asks for; None for one without.

    Raises:
        UserError: an unknown option, or as `trace` and `stories_of_step`.
    """
    words = sys.argv[1:] if argv is None else argv
    if not any(word == OPTION or word.startswith(f"{OPTION}=") for word in words):
        return None
    about = (ExplainConfig.__doc__ or "").splitlines()[0]
    config = parse(ExplainConfig, words, prog="evaluate.py", about=about, default=ExplainConfig())
    if not config.explain:
        raise UserError(f"{OPTION} is an empty word: name a model")
    from slm_ray.lineage.chain import stories_of_step, trace

    lineage = trace(config.explain, config.tracking_uri)
    found = None if config.step is None else stories_of_step(lineage, config.step, config.data)
    return as_json(lineage, found) if config.json else as_text(lineage, found)


def as_json(lineage: "Lineage", found: "StepStories | None") -> str:
    """All of it as one object on one line; `step` is null without a step."""
    state = lineage.state
    record = {
        "model": lineage.reference,
        "name": lineage.name,
        "version": lineage.version or None,
        "aliases": lineage.aliases,
        "run_id": lineage.run_id or None,
        "run_name": state.config.get("name"),
        "steps": state.step,
        "samples_seen": state.samples_seen,
        "weights_sha256": lineage.weights_sha256,
        "tokenizer_sha256": lineage.tokenizer_sha256,
        "attempts": [_attempt_record(attempt) for attempt in lineage.attempts],
        "are_attempts_recorded": bool(state.attempts),
        "data_lineage": state.data_lineage,
        "mixtures": {mark: [dataclasses.asdict(one) for one in shares] for mark, shares in state.mixtures.items()},
        "origin": dataclasses.asdict(state.origin) if state.origin else None,
        "teachers": [dataclasses.asdict(one) for one in state.teachers],
        "are_teachers_recorded": state.are_teachers_known,
        "preset": lineage.preset,
        "config_differences": {
            name: {"preset": preset, "run": own} for name, (preset, own) in lineage.differences.items()
        },
        "config": state.to_record()["config"],
        "step": None if found is None else _step_record(found),
    }
    return json.dumps(record)


def _attempt_record(attempt: Attempt) -> dict[str, Any]:
    code = attempt.code_version
    return {
        "after_step": attempt.step,
        "data_fingerprint": attempt.data_fingerprint,
        "seed": attempt.seed,
        "batch_size": attempt.batch_size,
        "workers": attempt.world_size or None,
        "commit": code.commit if code else None,
        "is_dirty": code.is_dirty if code else None,
    }


def _step_record(found: "StepStories") -> dict[str, Any]:
    return {
        "number": found.step,
        "attempt": found.attempt,
        "data_fingerprint": found.made_by.data_fingerprint,
        "seed": found.made_by.seed,
        "batch_size": found.made_by.batch_size,
        "seq_len": found.seq_len,
        "packing": found.packing,
        "windows": [
            {
                "number": window.number,
                **({"data": window.data} if window.data != found.data else {}),  # of a mixture
                "epoch": window.epoch,
                "stories": [_piece_record(piece) for piece in window.pieces],
            }
            for window in found.windows
        ],
    }


def _piece_record(piece: "Piece") -> dict[str, Any]:
    part = piece.part
    return {
        "story_id": part.story_id,
        "shard": part.shard.file,
        "row": part.row,
        "source_file": piece.source.file,
        "source_row": piece.source.row,
        "story_tokens": part.n_tokens,
        "tokens": [part.start, part.stop],
        "targets": [part.first_target, part.stop],
        "text": piece.text,
    }


def as_text(lineage: "Lineage", found: "StepStories | None") -> str:
    """The same for a reader."""
    lines = [*_chain(lineage), *([] if found is None else _step_lines(found))]
    return "\n".join(f"{name:<10} {text}".rstrip() for name, text in lines)


def _chain(lineage: "Lineage") -> Iterator[tuple[str, str]]:
    state = lineage.state
    if lineage.version:
        yield "version", f"{lineage.version} of {visible(lineage.name)}"
        yield "aliases", ", ".join(map(visible, lineage.aliases)) or "none"
    else:
        yield "version", f"none: {visible(lineage.reference)} is a folder"
    yield "weights", f"sha256 {lineage.weights_sha256}"
    yield "tokenizer", f"sha256 {lineage.tokenizer_sha256}"
    yield "run", f"{visible(lineage.run_id) or 'not tracked'}, named {visible(str(state.config.get('name') or '?'))}"
    yield "step", f"{state.step:,}, after {state.samples_seen:,} samples"
    for number, attempt in enumerate(lineage.attempts, 1):
        yield f"attempt {number}", _attempt_text(attempt, is_recorded=bool(state.attempts))
    if state.origin is not None:
        yield from _origin_lines(state.origin, "begun from")
    for teacher in state.teachers:
        yield from _origin_lines(teacher, "taught by")
    if not state.are_teachers_known:
        yield "taught by", "models that were not recorded"
    yield "config", f"as preset {lineage.preset}{', but for:' if lineage.differences else ''}"
    for name, (preset, own) in lineage.differences.items():
        yield "", visible(f"{name} {own} (there {preset})")
    for number, (data, step) in enumerate(state.data_lineage):
        yield "" if number else "data", f"{visible(data)} from step {step + 1:,} on"
        for one in state.mixtures.get(data, ()):
            yield "", f"  {one.weight:.2%} of {visible(one.name)}, {visible(one.fingerprint)}"


def _origin_lines(origin: Origin, how: str) -> Iterator[tuple[str, str]]:
    """Every model that it goes back to, the nearest first."""
    for number, link in enumerate(origin.chain):
        when = f" at step {link.step:,}" if link.step else ""
        run = f" of run {link.run_id}" if link.run_id else ""
        yield (
            "begun from" if number else how,
            visible(f"{link.reference}{when}{run}, weights of sha256 {link.weights_sha256}"),
        )
        for change in link.changes:
            yield "", visible(change)
        for teacher in link.teachers:
            yield from _origin_lines(teacher, "taught by")
    last = origin.chain[-1]
    if last.is_of_others or not last.is_start_known:
        yield "", "made by others" if last.is_of_others else "what that began from is not known"


def _attempt_text(attempt: Attempt, *, is_recorded: bool) -> str:
    data = f"from step {attempt.step + 1:,} on, data set {visible(attempt.data_fingerprint[:SHORT])}"
    if not is_recorded:
        return f"{data}; no more was recorded by the version that wrote this checkpoint"
    code = f"commit {visible(str(attempt.code_version))}" if attempt.code_version else "code that no commit names"
    workers = f"{attempt.world_size} worker(s), " if attempt.world_size else ""
    return f"{data}, batches of {attempt.batch_size}, seed {attempt.seed}, {workers}{code}"


def _step_lines(found: "StepStories") -> Iterator[tuple[str, str]]:
    made_by, is_packed = found.made_by, found.packing == "stories"
    what = f"{'samples of up to' if is_packed else 'windows of'} {found.seq_len} targets"
    yield "", ""
    yield (
        f"step {found.step}",
        f"of attempt {found.attempt}: {made_by.batch_size} {what} of data set "
        f"{visible(made_by.data_fingerprint[:SHORT])} in {visible(found.data)} (rows from 0, tokens from 1)",
    )
    kind = "whole stories, sample" if is_packed else "window"
    for place, window in enumerate(found.windows, 1):
        where = f" of {visible(window.data)}" if window.data != found.data else ""
        yield (
            f"sample {place}",
            f"{kind} {window.number} of the training split{where}, in epoch {window.epoch + 1}",
        )
        for piece in window.pieces:
            part = piece.part
            source = f"{visible(piece.source.file)} row {piece.source.row}"
            yield "", f"{visible(part.story_id)}: {source}; {part.shard.file} row {part.row}; {_extent(piece)}"
            yield "", f"  {visible(piece.text) or '(the end-of-text token)'}"


def _extent(piece: "Piece") -> str:
    """Which tokens of its story a window has: counted from 1, the last one included."""
    part = piece.part
    if part.stop - part.start == part.n_tokens:
        extent = f"all {part.n_tokens} tokens"
    elif part.stop - part.start == 1:
        extent = f"token {part.stop} of {part.n_tokens}"
    else:
        extent = f"tokens {part.start + 1} to {part.stop} of {part.n_tokens}"
    if part.first_target == part.stop:
        return f"{extent}, read and not predicted"
    return extent + (", the first of them read and not predicted" if part.first_target > part.start else "")
