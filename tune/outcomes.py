"""What became of a trial, read from its folder: nothing else is kept of it.

In: a trial's config and point. Out: a `Trial`, or None where it has not come so far yet. So a sweep that goes on, after
a kill too, decides as one that was never interrupted.
"""

import contextlib
import dataclasses
import json
import math
from typing import Any

from slm_ray import storage
from slm_ray.config.files import from_dict
from slm_ray.config.schema import TrainConfig
from slm_ray.dataset.manifest import load_manifest
from slm_ray.errors import UserError, one_line
from slm_ray.runs.outcome import SUMMARY, RunStatus, RunSummary
from slm_ray.runs.remote_identity import MLFLOW_ID
from slm_ray.runs.train_state import Evaluation, TrainState
from tune.results import METRIC, Trial, TrialStatus
from tune.space import Point
from tune.trials import run_folder, wall_seconds

COMPARED = (
    *("model", "optim", "seed", "batch_size", "epochs", "packing", "attention", "validation"),
    *("teacher_weight", "teacher_temperature", "mtp_weights", "mtp_until"),
)
"""What makes two trials comparable, besides their number of steps and the data."""
HISTORY = "metrics.jsonl"


def refuse_other_trial(config: TrainConfig) -> None:
    """Refuse a folder whose run is another one.

    Raises:
        UserError: it was run with other options: its result would stand in a table of trials that are not like it.
    """
    where, state = run_folder(config).address, latest_state(config)
    if state is None:
        return
    was = from_dict(TrainConfig, state.config, where)
    changed = [name for name in COMPARED if getattr(was, name) != getattr(_with_vocabulary(config, was), name)]
    if changed or state.data_fingerprint != load_manifest(config.data).fingerprint:
        what = ", ".join(changed) or "data"
        raise UserError(f"{where} was trained with another {what}: take another --name, or remove it")


def _with_vocabulary(config: TrainConfig, was: TrainConfig) -> TrainConfig:
    """The vocabulary's size is open until a run resolves it."""
    if config.model.vocab_size:
        return config
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=was.model.vocab_size))


def trial_at(config: TrainConfig, point: Point, step: int) -> Trial | None:
    """The trial as it stands at a rung: the best validation up to there; or as it ended before."""
    ended = ended_trial(config, point)
    if step >= config.max_steps:
        return ended
    evaluations = validations(config)
    if any(one.step == step for one in evaluations):
        best = min((one for one in evaluations if one.step <= step), key=lambda one: one.val_loss)
        return _trial(config, point, _run_id(config), best, status=TrialStatus.STOPPED, step=step)
    return ended


def ended_trial(config: TrainConfig, point: Point) -> Trial | None:
    """The trial, once it has run to its last step, or diverged on the way, which is a result too."""
    summary = _summary(config)
    if summary is None or summary.max_steps != config.max_steps:
        return None
    if summary.status == RunStatus.DIVERGED:
        how = {"status": TrialStatus.DIVERGED, "reason": summary.reason, "step": summary.step}
        return _trial(config, point, _run_id(config), None, **how)
    if summary.status != RunStatus.FINISHED or summary.best is None or not _has_checkpoint(config):
        return None
    return _trial(config, point, _run_id(config), summary.best, step=summary.step)


def failed_trial(config: TrainConfig, point: Point, reason: str) -> Trial:
    """The row of a trial that came to no end."""
    state = latest_state(config)
    step = state.step if state else 0
    return _trial(config, point, _run_id(config), None, status=TrialStatus.FAILED, reason=reason, step=step)


def _trial(config: TrainConfig, point: Point, run_id: str, best: Evaluation | None, **how: object) -> Trial:
    metrics = {"step": float(best.step), **best.metrics} if best else {}
    tokens = _tokens(config, int(str(how["step"])))
    return Trial(point=point, metrics=metrics, run_id=run_id, tokens=tokens, wall_s=wall_seconds(config), **how)  # type: ignore[arg-type]


def _tokens(config: TrainConfig, step: int) -> int:
    """Targets that a trial has learned from up to a step, as its own record counts them."""
    counted = [line for line in _lines(config) if "tokens" in line and 0 < int(line["step"]) <= step]
    if not counted:
        return step * config.batch_size * config.model.seq_len
    return round(float(counted[-1]["tokens"]) * step / int(counted[-1]["step"]))


def _run_id(config: TrainConfig) -> str:
    """Of its newest checkpoint; or that which it got later, where the server was away."""
    state = latest_state(config)
    return (state.run_id if state else "") or _text(config, MLFLOW_ID).strip()


def latest_state(config: TrainConfig) -> TrainState | None:
    """State of a trial's newest checkpoint, wherever it is kept. Raises: UserError when that cannot be read now."""
    run = run_folder(config)
    return run.mirror.newest_state(run.path) if run.mirror.address else run.latest_state()


def _has_checkpoint(config: TrainConfig) -> bool:
    run = run_folder(config)
    return latest_state(config) is not None if run.mirror.address else run.latest_valid() is not None


def _summary(config: TrainConfig) -> RunSummary | None:
    """How the last start of a trial ended, if it came to an end."""
    text = _text(config, SUMMARY)
    try:
        return RunSummary.from_json(text) if text else None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        where = f"{run_folder(config).address}/{SUMMARY}"
        raise UserError(f"{where} is no summary that this version reads: remove it and --resume") from error


def _text(config: TrainConfig, name: str) -> str:
    """A file of a trial where it is kept, not a copy of it; empty where there is none."""
    path = storage.storage_path(config.output) / config.name / name
    try:
        return storage.read(path).decode("utf-8")
    except FileNotFoundError:
        return ""
    except Exception as error:  # each store has errors of its own
        raise UserError(f"{run_folder(config).address}/{name} cannot be read: {one_line(error)}") from error


def validations(config: TrainConfig) -> list[Evaluation]:
    """Those that a trial's own record holds, in their order."""
    lines = [line for line in _lines(config) if METRIC in line and "val_loss" in line]
    found = [Evaluation.from_record(line) for line in lines]
    return [one for one in found if one is not None and math.isfinite(one.val_loss)]


def _lines(config: TrainConfig) -> list[dict[str, Any]]:
    """The lines of a trial's own record."""
    lines = []
    for text in _text(config, HISTORY).splitlines():
        with contextlib.suppress(ValueError):  # the last one may be a part
            lines.append(json.loads(text))
    return lines
