"""What became of a trial, read from its folder: nothing else is kept of it.

In: a trial's config and point. Out: a `Trial`, or None where it has not come so far yet. So a sweep that goes on, after
a kill too, decides as one that was never interrupted.
"""

import dataclasses
import math

from slm_ray.config.files import from_dict
from slm_ray.config.schema import TrainConfig
from slm_ray.dataset.manifest import load_manifest
from slm_ray.errors import UserError
from slm_ray.runs.history import History
from slm_ray.runs.outcome import RunStatus, has_summary, read_summary
from slm_ray.runs.run_folder import RunFolder
from slm_ray.runs.train_state import Evaluation
from tune.results import METRIC, Trial, TrialStatus
from tune.space import Point
from tune.trials import run_folder, wall_seconds

COMPARED = ("model", "optim", "seed", "batch_size", "epochs")
"""What makes two trials comparable, besides their number of steps and the data."""
HISTORY = "metrics.jsonl"


def refuse_other_trial(config: TrainConfig) -> None:
    """Refuse a folder whose run is another one.

    Raises:
        UserError: it was run with other options: its result would stand in a table of trials that are not like it.
    """
    folder = run_folder(config)
    state = folder.latest_state()
    if state is None:
        return
    was = from_dict(TrainConfig, state.config, str(folder.path))
    changed = [name for name in COMPARED if getattr(was, name) != getattr(_with_vocabulary(config, was), name)]
    if changed or state.data_fingerprint != load_manifest(config.data).fingerprint:
        what = ", ".join(changed) or "data"
        raise UserError(f"{folder.path} was trained with another {what}: take another --name, or remove it")


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
    evaluations = validations(run_folder(config))
    if any(one.step == step for one in evaluations):
        best = min((one for one in evaluations if one.step <= step), key=lambda one: one.val_loss)
        return _trial(config, point, _run_id(config), best, status=TrialStatus.STOPPED, step=step)
    return ended


def ended_trial(config: TrainConfig, point: Point) -> Trial | None:
    """The trial, once it has run to its last step, or diverged on the way, which is a result too."""
    folder = run_folder(config)
    if not has_summary(folder) or (summary := read_summary(folder)).max_steps != config.max_steps:
        return None
    if summary.status == RunStatus.DIVERGED:
        how = {"status": TrialStatus.DIVERGED, "reason": summary.reason, "step": summary.step}
        return _trial(config, point, summary.run_id, None, **how)
    if summary.status != RunStatus.FINISHED or summary.best is None or folder.latest_valid() is None:
        return None
    return _trial(config, point, summary.run_id, summary.best, step=summary.step)


def failed_trial(config: TrainConfig, point: Point, reason: str) -> Trial:
    """The row of a trial that came to no end."""
    state = run_folder(config).latest_state()
    step = state.step if state else 0
    return _trial(config, point, _run_id(config), None, status=TrialStatus.FAILED, reason=reason, step=step)


def _trial(config: TrainConfig, point: Point, run_id: str, best: Evaluation | None, **how: object) -> Trial:
    metrics = {"step": float(best.step), **best.metrics} if best else {}
    tokens = int(str(how["step"])) * config.batch_size * config.model.seq_len
    return Trial(point=point, metrics=metrics, run_id=run_id, tokens=tokens, wall_s=wall_seconds(config), **how)  # type: ignore[arg-type]


def _run_id(config: TrainConfig) -> str:
    state = run_folder(config).latest_state()
    return state.run_id if state else ""


def validations(folder: RunFolder) -> list[Evaluation]:
    """Those that the run's own record holds, in their order."""
    lines = History(folder.path / HISTORY).lines()
    found = [Evaluation.from_record(line) for line in lines if METRIC in line and "val_loss" in line]
    return [one for one in found if one is not None and math.isfinite(one.val_loss)]
