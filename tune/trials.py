"""The trials of a sweep through Ray Tune: each a Ray Train run of its own. Ray Tune lives here only.

In: the training config of each point, by the trial's name. Out: `SWEEP/trials/NAME/`, a run's folder each, and a line
on the terminal for what happens. A trial that was interrupted continues from its last checkpoint; why one failed stands
in `SWEEP/trials/NAME.log`.
"""

import contextlib
import dataclasses
import os
import shutil
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray import cloudpickle, tune
from ray.exceptions import RayActorError, RayTaskError
from ray.tune.integration.ray_train import TuneReportCallback

from slm_ray.config.files import from_dict
from slm_ray.config.schema import TrainConfig
from slm_ray.dataset.manifest import load_manifest
from slm_ray.distributed.driver import run_training
from slm_ray.errors import UserError, one_line, without_secrets
from slm_ray.runs.outcome import RunStatus, has_summary, read_summary
from slm_ray.runs.run_folder import RunFolder
from tune.results import METRIC, Trial, TrialStatus

COMPARED = ("model", "optim", "seed", "batch_size", "epochs")
"""What makes two trials comparable, besides their number of steps and the data."""
DRIVER_CPUS = 0.01  # of each trial's own driver; Tune refuses 0, and a whole CPU would leave none for the workers


def trial_name(lr: float, d_ff: int) -> str:
    """Folder and run name of a point, another one for each: `trial_name(5e-4, 512)` is `"lr0.0005-dff512"`."""
    short = f"{lr:g}"
    return f"lr{short if float(short) == lr else repr(lr)}-dff{d_ff}"


def ended_trial(config: TrainConfig) -> Trial | None:
    """What a trial's folder holds, once it has run to its last step, or diverged on the way, which is a result too.

    Raises:
        UserError: it was run with other options: its result would stand in a table of trials that are not like it.
    """
    folder = RunFolder(Path(config.output) / config.name)
    latest = folder.latest_valid()
    if latest is not None:
        was = from_dict(TrainConfig, latest.state.config, str(latest.path))
        changed = [name for name in COMPARED if getattr(was, name) != getattr(_with_vocabulary(config, was), name)]
        if changed or latest.state.data_fingerprint != load_manifest(config.data).fingerprint:
            what = ", ".join(changed) or "data"
            raise UserError(f"{folder.path} was trained with another {what}: take another --name, or remove it")
    if not has_summary(folder) or (summary := read_summary(folder)).max_steps != config.max_steps:
        return None
    lr, d_ff = config.optim.lr, config.model.d_ff
    if summary.status == RunStatus.DIVERGED:
        return Trial(lr, d_ff, {}, summary.run_id, TrialStatus.DIVERGED, summary.reason, summary.step)
    if latest is None or summary.status != RunStatus.FINISHED or summary.best is None:
        return None
    return Trial(lr, d_ff, {"step": summary.best.step, **summary.best.metrics}, summary.run_id)


def failed_trial(config: TrainConfig, reason: str) -> Trial:
    """The row of a trial that came to no end."""
    latest = RunFolder(Path(config.output) / config.name).latest_valid()
    run_id, step = (latest.state.run_id, latest.state.step) if latest else ("", 0)
    return Trial(config.optim.lr, config.model.d_ff, {}, run_id, TrialStatus.FAILED, reason, step)


def _with_vocabulary(config: TrainConfig, was: TrainConfig) -> TrainConfig:
    """The vocabulary's size is open until a run resolves it."""
    if config.model.vocab_size:
        return config
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=was.model.vocab_size))


def log_path(config: TrainConfig) -> Path:
    """Where the whole of what a trial failed with is kept: beside its folder."""
    return Path(config.output) / f"{config.name}.log"


def run_trials(
    configs: Mapping[str, TrainConfig], at_once: int, folder: Path, parent_run_id: str, tracking_uri: str
) -> dict[str, str]:
    """Run the given trials, recorded in the store `tracking_uri` (resolved). Returns why each that failed did.

    The others go on. What Ray says of a failure goes to the trial's log, not to the terminal.
    """
    plain = {name: dataclasses.asdict(config) for name, config in configs.items()}
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # this folder is not installed on the workers

    def train_point(point: dict[str, Any]) -> None:
        train_trial(plain[point["trial"]], parent_run_id, tracking_uri)

    for config in configs.values():
        log_path(config).unlink(missing_ok=True)
    state = folder / ".tune"  # a new name each time: Tune must not restore by itself
    tuner = tune.Tuner(
        tune.with_resources(train_point, {"CPU": DRIVER_CPUS}),  # its workers ask for their own
        param_space={"trial": tune.grid_search(list(configs))},
        tune_config=tune.TuneConfig(max_concurrent_trials=at_once),
        run_config=tune.RunConfig(
            name=uuid.uuid4().hex, storage_path=str(state), verbose=0, callbacks=[TrialLines(len(configs))]
        ),
    )
    try:
        results = tuner.fit()
    finally:
        shutil.rmtree(state, ignore_errors=True)
    errors = {str(result.config["trial"]): result.error for result in results if result.config and result.error}
    return {name: _keep_failure(configs[name], error) for name, error in errors.items()}


def _keep_failure(config: TrainConfig, error: Exception) -> str:
    """Why a trial failed, in one line that names its log, which is written here."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    reason = f"its process was killed ({type(error).__name__})" if isinstance(error, RayActorError) else one_line(cause)
    with contextlib.suppress(OSError):  # a full disk may be the reason
        log_path(config).parent.mkdir(parents=True, exist_ok=True)
        log_path(config).write_text(without_secrets(str(error)) + "\n", encoding="utf-8")
        reason += f" (all of it in {log_path(config)})"
    return reason


def train_trial(plain: Mapping[str, Any], parent_run_id: str, tracking_uri: str) -> None:
    """One trial, in a process of Tune's: a Ray Train run of its own, continued where it stopped.

    What the sweep's address means is settled where the sweep runs; a trial's config does not keep it.
    """
    os.environ["MLFLOW_TRACKING_URI"] = tracking_uri
    config = from_dict(TrainConfig, plain, "the sweep's config")
    resumed = dataclasses.replace(config, tracking_uri="", resume=True)
    run_training(resumed, parent_run_id=parent_run_id, is_quiet=True, callbacks=[TuneReportCallback()])


class TrialLines(tune.Callback):  # type: ignore[misc]  # Ray is not typed
    """One line on the terminal for each validation and end of a trial."""

    def __init__(self, n_trials: int) -> None:
        self.n_trials = n_trials
        self.n_ended = 0

    def on_trial_result(self, *, trial: Any, result: dict[str, Any], **_: Any) -> None:
        """A validation of a trial."""
        if METRIC in result:
            _say(f"  {trial.config['trial']}  step {int(result['step']):,}  {result[METRIC]:.4f} bits per byte")

    def on_trial_complete(self, *, trial: Any, **_: Any) -> None:
        """A trial that ended well."""
        self._end(trial, "finished")

    def on_trial_error(self, *, trial: Any, **_: Any) -> None:
        """A trial that diverged or failed; why stands in the table."""
        self._end(trial, "did not finish")

    def _end(self, trial: Any, how: str) -> None:
        self.n_ended += 1
        _say(f"  {trial.config['trial']}  {how} ({self.n_ended} of {self.n_trials})")


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
