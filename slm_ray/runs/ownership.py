"""Whether a folder is a run's, before anything in it is touched.

In: a folder. Out: nothing, or a refusal. A run marks its folder; runs of earlier versions are known by their names.
"""

from pathlib import Path

from slm_ray.errors import UserError

MARK = ".slm-ray-run"
CONTENTS = ("best", "latest", "checkpoints", "metrics.jsonl", "summary.json", "error.txt", "refusal.txt", "loss.png")
MORE_CONTENTS = (
    "profile",
    "tensorboard",
    "wandb",
    "stop",
    "run.id",
    "mlflow.id",
    ".ray",
    ".lease",
    ".lease-owner",
    MARK,
)


def refuse_foreign(folder: Path) -> None:
    """Refuse a folder that holds other things than a run.

    Raises:
        UserError: it is neither empty nor a run's.
    """
    try:
        names = {path.name for path in folder.iterdir()}
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from error
    foreign = sorted(names - {*CONTENTS, *MORE_CONTENTS})
    if foreign and MARK not in names:
        raise UserError(f"{folder} is no folder of a run (it holds {foreign[0]}): take another --name or --output")


def mark(folder: Path) -> None:
    """Make a run's folder and mark it: what else the user puts there later is no reason to refuse it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).touch()
