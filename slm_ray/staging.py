"""From a staging folder to a data set: nothing is seen before all of it is there.

In: the output folder and what the pipeline wrote below its `.staging`. Out: a data set whose manifest appears
last. The last step of `pipelines/prepare.py`. An earlier data set in the same folder stays whole until the new
one is complete; then its manifest goes first, so no reader ever takes a mixture for a data set.
"""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from slm_ray.errors import UserError
from slm_ray.shards import MANIFEST, REJECTED, SPLITS, TOKENIZER, Manifest, checked_content, replace_file

STAGING = ".staging"
REPORT = "report"
CONTENTS = (*SPLITS, REJECTED, REPORT, TOKENIZER)
"""Everything a data set holds besides its manifest."""


@contextlib.contextmanager
def only_writer(output: Path) -> Iterator[None]:
    """Make the output folder, and keep other jobs out of it until the end of the block or of this process.

    The folder itself is locked: a lock file would be in the way of `publish`, which removes all of `.staging`.

    Raises:
        UserError: another job is writing there, or the folder cannot be made.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        folder = os.open(output, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"cannot write to {output}: {error.strerror}") from error
    try:
        _lock(folder, output)
        yield
    finally:
        os.close(folder)


def begin(output: Path, key: str) -> Path:
    """An empty staging folder for one job, named by what decides about its bytes.

    Raises:
        UserError: the output folder cannot be written, or holds files that are no data set.
    """
    _refuse_foreign(output)
    folder = output / STAGING / key
    try:
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"cannot write to {output}: {error.strerror}") from error
    return folder


def publish(output: Path, staged: Path, manifest: Manifest) -> None:
    """Move a finished job into place, and put its manifest there by one rename."""
    (output / MANIFEST).unlink(missing_ok=True)
    for name in CONTENTS:
        _remove(output / name)
        if (staged / name).exists():
            (staged / name).rename(output / name)
    replace_file(output / MANIFEST, manifest.to_json().encode("utf-8"))
    shutil.rmtree(output / STAGING)


def damage(output: Path, manifest: Manifest) -> str | None:
    """What is wrong with the files that a manifest lists, or None when all are as they were written."""
    listed = [split.shards for split in (*manifest.splits.values(), manifest.rejected)]
    files = [(shard.file, shard.sha256) for part in listed for shard in part]
    try:
        for file, sha256 in [*files, (TOKENIZER, manifest.tokenizer["sha256"])]:
            checked_content(output / file, sha256)
    except UserError as error:
        return str(error)
    return None


def _lock(folder: int, output: Path) -> None:
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(
            f"another prepare.py is writing to {output}: wait for its end, or choose another --output"
        ) from error
    except OSError:  # a file system without locks for folders, as NFS: then nobody is kept out
        return


def _refuse_foreign(output: Path) -> None:
    """Publishing replaces folders called `train`, `test` or `report`: never somebody else's."""
    manifest = output / MANIFEST
    if manifest.exists():
        is_ours = '"fingerprint"' in manifest.read_text(encoding="utf-8", errors="replace")
    else:  # a job that was stopped while it published leaves its staging folder
        is_ours = (output / STAGING).exists()
    foreign = [name for name in (*CONTENTS, MANIFEST) if (output / name).exists()]
    if foreign and not is_ours:
        raise UserError(
            f"{output} holds {', '.join(foreign)}, which is no data set of this program: choose another --output"
        )


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
