"""Which code is running: the commit of the checkout that this package lies in.

In: git. Out: a `CodeVersion`, for the checkpoints of a run and the tags of its record; none outside of a checkout. It
holds no path.
"""

import functools
import logging
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

LOGGER = logging.getLogger(__name__)
GIT_WITHIN_S = 20.0


@dataclass(frozen=True, kw_only=True)
class CodeVersion:
    """A state of the code."""

    commit: str
    """Its hash."""
    is_dirty: bool
    """Whether files that git knows differed from the commit."""

    @property
    def tags(self) -> dict[str, str]:
        """As MLflow names them: its pages show the first."""
        return {"mlflow.source.git.commit": self.commit, "mlflow.source.git.dirty": str(self.is_dirty).lower()}

    def __str__(self) -> str:
        return self.commit + (", with changes that were not committed" if self.is_dirty else "")


@functools.cache
def code_version() -> CodeVersion | None:
    """The code of this process, as it was when first asked; None where this package lies in no checkout of its own."""
    return version_of(Path(__file__).parents[2], "slm_ray/runs/code_version.py")


def version_of(checkout: Path, file: str) -> CodeVersion | None:
    """The commit of a checkout in which git knows `file`; None where it does not, or where git cannot be asked.

    A package that was installed into somebody's project is not that project's code. That git cannot be asked, though
    there is a checkout, is logged.
    """
    if not (checkout / ".git").exists():
        return None
    try:
        if not _git(checkout, "ls-files", "--", file):
            return None
        commit = _git(checkout, "rev-parse", "--verify", "HEAD")
        status = _git(checkout, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError) as error:
        LOGGER.warning("the commit of the code is not recorded: git cannot be asked (%s)", _reason(error))
        return None
    return CodeVersion(commit=commit, is_dirty=bool(status)) if re.fullmatch("[0-9a-f]{40,64}", commit) else None


def _git(checkout: Path, *words: str) -> str:
    """What git prints. It takes no lock, and nothing of a git around this process: a hook sets GIT_DIR."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    done = subprocess.run(
        ["git", "--no-optional-locks", "-C", str(checkout), *words],
        env=environment | {"LC_ALL": "C"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=GIT_WITHIN_S,
        check=True,
    )
    return done.stdout.strip()


def _reason(error: Exception) -> str:
    """One line without the checkout's place."""
    if isinstance(error, subprocess.CalledProcessError):
        said = (error.stderr or "").strip().partition("\n")[0]
        return (
            "it does not trust the folder's owner" if "dubious ownership" in said else f"exit code {error.returncode}"
        )
    return "it takes too long" if isinstance(error, subprocess.TimeoutExpired) else "it is not installed"
