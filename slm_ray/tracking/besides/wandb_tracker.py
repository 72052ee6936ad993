"""Weights & Biases: `--wandb`.

In: metrics and samples. Out: a run of wandb, on its server or, with `WANDB_MODE=offline`, in `runs/NAME/wandb/` until
`wandb sync` sends it. The package is optional and lives here only. Its account and server are wandb's own affair
(`wandb login`, WANDB_API_KEY, WANDB_BASE_URL); what it is told holds no password, no path and nothing of the machine.
"""

import importlib.util
import os
import re
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from slm_ray.config.files import flatten
from slm_ray.config.places import portable_config
from slm_ray.errors import UserError, without_secrets
from slm_ray.tracking.delivery_queue import DeliveryQueue
from slm_ray.tracking.tracker import NullTracker

FOLDER = "wandb"
_ID_FILE = "run-id"
_STEP = "step"
INIT_TIMEOUT_S = 20.0
"""For its server to answer; less than what the end of a run waits for its records."""


def require_wandb() -> None:
    """Say what is missing before anything starts.

    Raises:
        UserError: the package is not installed.
    """
    spec = importlib.util.find_spec("wandb")
    if spec is None or spec.loader is None or spec.origin is None:  # a folder of that name, as wandb itself makes one
        raise UserError("--wandb needs the package wandb: `pip install 'slm-ray[wandb]'`, or leave the option out")


class WandbTracker(NullTracker):
    """A tracker that writes metrics and samples to a run of wandb; a failure costs a warning."""

    def __init__(self, folder: Path, name: str, config: Mapping[str, Any], warn: Callable[[str], None]) -> None:
        self._folder, self._name, self._config = folder, name, config
        self._queue = DeliveryQueue("wandb", warn)
        self._run: Any = None

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Record values at a step; one that was recorded before may come again."""
        copy = {**metrics, _STEP: step}
        self._queue.put(lambda: self._open().log(copy))

    def log_text(self, text: str, name: str) -> None:
        """Keep a sample, which is named by its step; other texts are left out."""
        folder, _, step = name.removesuffix(".txt").partition("/step-")
        if step.isdigit():
            self._queue.put(lambda: self._open().log({folder: text, _STEP: int(step)}))

    def _open(self) -> Any:
        """The run, begun or gone on with at the first value."""
        if self._run is None:
            import wandb

            self._folder.mkdir(parents=True, exist_ok=True)
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT") or _project(str(self._config.get("experiment", ""))),
                name=self._name,
                id=_run_id(self._folder),
                resume="allow",
                dir=str(self._folder.parent),  # to which wandb adds its own name, which is the folder's
                config=public_config(self._config),
                settings=wandb.Settings(
                    host="unnamed",
                    silent=True,
                    console="off",
                    init_timeout=INIT_TIMEOUT_S,
                    disable_code=True,
                    disable_git=True,
                    save_code=False,
                    x_disable_meta=True,
                    x_disable_machine_info=True,
                    x_disable_stats=True,
                    x_save_requirements=False,  # the names of all installed packages, and the platform
                ),
            )
            self._run.define_metric(_STEP, hidden=True)
            self._run.define_metric("*", step_metric=_STEP)
        return self._run

    def finish(self, status: str = "FINISHED") -> None:
        """End the run with MLflow's status word."""
        self._end(0 if status == "FINISHED" else 1)

    def close(self) -> None:
        """Wait until all is written, or given up; the run may go on under the same id."""
        self._end(0)

    def _end(self, exit_code: int) -> None:
        self._queue.put(lambda: self._finish(exit_code))
        self._queue.flush()

    def _finish(self, exit_code: int) -> None:
        run, self._run = self._run, None
        if run is not None:
            run.finish(exit_code=exit_code)


def public_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config by their dotted names; of whatever looks like a place, its last name alone."""
    fields = flatten(portable_config(config))
    return {
        name: PurePosixPath(without_secrets(value)).name if isinstance(value, str) and "/" in value else value
        for name, value in fields.items()
    }


def _project(experiment: str) -> str:
    """A name that wandb takes: some characters are not allowed."""
    return re.sub(r"[/\\#?%:\s]+", "-", experiment).strip("-")[:128] or "slm-ray"


def _run_id(folder: Path) -> str:
    """The id of the run, kept in its folder, so that a resumed run goes on in the same one."""
    path = folder / _ID_FILE
    if not path.exists():
        path.write_text(uuid.uuid4().hex, encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()
