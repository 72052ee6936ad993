"""How a run ended: `summary.json`, left beside its checkpoints.

In: the loop's last words. Out: a `RunSummary` for the driver and the sweep, on any machine that sees the run.
"""

import dataclasses
import json
from enum import StrEnum
from typing import Any

from slm_ray import storage
from slm_ray.errors import UserError
from slm_ray.model_files.json_files import MAX_JSON_BYTES
from slm_ray.runs.run_folder import RunFolder
from slm_ray.runs.train_state import Evaluation

SUMMARY = "summary.json"
ERROR = "error.txt"
REFUSAL = "refusal.txt"


class RunStatus(StrEnum):
    """Why a run ended."""

    FINISHED = "finished"  # at its last step, or out of patience
    DIVERGED = "diverged"  # the loss or its gradient ceased to be a number or exploded
    STOPPED = "stopped"  # as asked, with a checkpoint of its last step
    UNSAVED = "unsaved"  # the disk refused the last checkpoint


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSummary:
    """What a run ended with."""

    status: RunStatus
    reason: str
    """Of a run that diverged: what the loss or the gradient did."""
    step: int
    max_steps: int
    metrics: Evaluation | None
    """The last validation."""
    best: Evaluation | None
    """That of the checkpoint `best`."""
    run_id: str
    """Run of the tracker, empty without one."""

    def to_json(self) -> str:
        """The content of `summary.json`."""
        best = {"step": self.best.step, **self.best.record} if self.best else {}
        evaluations = {"metrics": self.metrics.record if self.metrics else {}, "best": best}
        return json.dumps(dataclasses.asdict(self) | evaluations, indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "RunSummary":
        """Read `to_json()`'s output back. Raises: ValueError."""
        try:
            fields: dict[str, Any] = {"reason": "", **json.loads(text)}
            fields["status"] = RunStatus(fields["status"])
            fields["metrics"] = Evaluation.from_record(fields["metrics"], fields["step"])
            fields["best"] = Evaluation.from_record(fields["best"])
            kinds = {"step": int, "max_steps": int, "reason": str, "run_id": str}
            odd = [name for name, kind in kinds.items() if type(fields[name]) is not kind]
            if odd:
                raise ValueError(f"{odd[0]} is {fields[odd[0]]!r:.40}")
            return cls(**fields)
        except (KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise ValueError(str(error)) from error


def has_summary(run: RunFolder) -> bool:
    """Whether the run came to an end, good or bad."""
    return (run.path / SUMMARY).is_file()


def read_summary(run: RunFolder) -> RunSummary:
    """What `write_summary` left.

    Raises:
        UserError: there is none on this machine (the workers wrote to a disk that is not shared), or it is none, or it
            cannot be read.
    """
    path = run.path / SUMMARY
    try:
        with path.open("rb") as file:
            return RunSummary.from_json(file.read(MAX_JSON_BYTES).decode("utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is no summary that this version reads: remove it and --resume") from error
    except FileNotFoundError as error:
        raise UserError(
            f"the workers left nothing in {run.path} that this machine sees: give an --output that all nodes share"
        ) from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def write_summary(run: RunFolder, summary: RunSummary) -> None:
    """Leave the run's result beside its checkpoints, here and in the mirror. Raises: OSError, LeaseLostError."""
    run.check_lease()
    storage.replace_file(run.path / SUMMARY, summary.to_json().encode())
    run.push_record()


def clear_outcome(run: RunFolder) -> None:
    """Before a start: forget how it ended the last time."""
    for name in (SUMMARY, ERROR, REFUSAL):
        storage.remove(run.path / name)
    run.mirror.remove(SUMMARY)


def write_refusal(run: RunFolder, message: str) -> None:
    """Leave word of a mistake of the user's that a worker met: no other worker has to meet it again."""
    run.path.mkdir(parents=True, exist_ok=True)
    storage.replace_file(run.path / REFUSAL, message.encode("utf-8"))


def has_refusal(run: RunFolder) -> bool:
    """Whether a worker of this start met one."""
    return (run.path / REFUSAL).is_file()


def read_refusal(run: RunFolder) -> str:
    """What `write_refusal` left, or an empty text."""
    return (run.path / REFUSAL).read_text(encoding="utf-8") if has_refusal(run) else ""
