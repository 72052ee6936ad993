"""From a staging folder to a data set: it appears whole or not at all, and finished ranges are not repeated.

In: the output folder and what the pipeline wrote below its `.staging`. Out: a data set whose manifest appears
last. The last step of `pipelines/prepare.py`. An earlier data set in the same folder stays whole until the new
one is complete; then its manifest goes first, so no reader ever takes a mixture for a data set. A job that was
killed, at whatever moment, leaves its staging folder; the same job finds there which ranges are finished.
"""

import contextlib
import importlib.metadata
import json
import os
import re
import tempfile
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from slm_ray import storage
from slm_ray.dataset.manifest import FORMAT_VERSION, MANIFEST, REJECTED, SPLITS, TOKENIZER, Manifest, load_manifest
from slm_ray.dataset.shards import UnreadableError, checked_content
from slm_ray.errors import UserError, reason
from slm_ray.locks import folder_lock, store_lock
from slm_ray.locks.lease import Lease
from slm_ray.storage import StoragePath, json_sha256
from slm_ray.tokenization.to_sentencepiece import MODEL_FILE, VOCAB_FILE
from slm_ray.tokenization.tokenizer import END_OF_TEXT

STAGING = ".staging"
REPORT = "report"
SENTENCEPIECE = (MODEL_FILE, VOCAB_FILE)
"""Of a Unigram tokenizer that was trained, the same for SentencePiece."""
CONTENTS = (*SPLITS, REJECTED, REPORT, TOKENIZER, *SENTENCEPIECE)
"""Everything a data set holds besides its manifest."""

_SHARD_NAME = re.compile(r"[0-9]{5,}\.parquet")
# a shard, the report, and what a kill left of them
_OWN_NAME = re.compile(rf"{_SHARD_NAME.pattern}|[a-z_]+\.(?:html|png|svg)|\..+\.[0-9]+-[0-9a-f]{{8}}")

DECIDING_PACKAGES = ("pyarrow", "tokenizers", "gigatoken", "ftfy", "sentencepiece", "numpy")
"""Another version of these may write other bytes, so it does not continue what one began."""
DECIDING_CODE = ("sources", "preparation", "dataset", "tokenization", "corpus", "storage.py", "errors.py")
"""Another version of these rooms and files of the package does not either."""
PACKAGE = Path(__file__).parents[1]


@contextlib.contextmanager
def locked(output: StoragePath) -> Iterator[Lease]:
    """Make the output folder, and keep other jobs out of it until the end of the block or of this process.

    In an object store, and on a disk without locks, by a lease: `check` it before others would see what is written.

    Raises:
        UserError: another job is writing there, or that cannot be known, or the folder cannot be made.
        LeaseLostError: at the end, where another job has taken the place over.
    """
    refusal = f"another prepare.py is writing to {output}: wait for its end, or choose another --output"
    lease = Lease(output)
    held = folder_lock.locked(output, refusal, lease) if isinstance(output, Path) else None
    with held or store_lock.locked(lease, _folder_here(output), refusal):
        yield lease


def _folder_here(output: StoragePath) -> Path:
    """What stands for a place in a store on this machine, for its lock."""
    key = json_sha256(output.as_posix())[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "slm-ray" / "preparations" / key
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError:  # a user without a home
        return Path(tempfile.gettempdir()) / f"slm-ray-{os.getuid()}" / key
    return cache


def job_key(source_digest: str, parameters: dict[str, Any]) -> str:
    """A name for all that decides about a job's bytes: the same job, and no other, goes on in its staging folder.

    That includes the code of the rooms that make the bytes, and Python's tables of characters: half a data set cleaned
    by one version and half by the next would be neither's. What trains and serves is left out.
    """
    versions = {name: _version(name) for name in DECIDING_PACKAGES}
    versions |= {"slm_ray": _code_digest(), "unicode": unicodedata.unidata_version}
    return json_sha256([FORMAT_VERSION, source_digest, parameters, versions])[:16]


def _code_digest() -> str:
    found = [path for name in DECIDING_CODE for path in (PACKAGE / name, *(PACKAGE / name).rglob("*.py"))]
    files = {path.relative_to(PACKAGE).as_posix(): path.read_text(encoding="utf-8") for path in found if path.is_file()}
    return json_sha256(files)


def begin(output: StoragePath, key: str) -> StoragePath:
    """The staging folder of a job; what an interrupted run of the same job finished is still in it.

    Raises:
        UserError: the output folder cannot be written, or holds files that are no data set.
    """
    try:
        _refuse_foreign(output)
        folder = output / STAGING / key
        storage.make_folder(folder)
        storage.replace_file(folder / "job", key.encode())
    except UserError:
        raise
    except Exception as error:  # of the many object stores each has its own
        raise _unwritable(output, error) from error
    return folder


def begin_tokenizer(output: StoragePath, key: str, *, force: bool) -> StoragePath:
    """The staging folder of a job that makes a tokenizer alone.

    Raises:
        UserError: the output folder cannot be written, holds a data set, or, without force, a tokenizer.
    """
    if storage.exists(output / MANIFEST):
        raise UserError(f"{output} holds a data set: choose another --output for a tokenizer alone")
    found = [name for name in (TOKENIZER, *SENTENCEPIECE) if storage.exists(output / name)]
    if found and not force:
        raise UserError(f"{output} holds {', '.join(found)}: choose another --output, or replace it with --force")
    try:
        folder = output / STAGING / key
        storage.make_folder(folder)
    except Exception as error:  # of the many object stores each has its own
        raise _unwritable(output, error) from error
    return folder


def publish_tokenizer(output: StoragePath, staged: StoragePath) -> list[str]:
    """Move a finished tokenizer into place, `tokenizer.json` last; returns the names of its files."""
    written = [name for name in (*SENTENCEPIECE, TOKENIZER) if storage.exists(staged / name)]
    for name in (*SENTENCEPIECE, TOKENIZER):
        if name in written:
            storage.put(staged / name, output / name)
        else:
            storage.remove(output / name)
    storage.remove(output / STAGING)
    return written


def refuse_own_files(paths: Iterable[str], output: StoragePath) -> None:
    """What a glob found must not be what an earlier job wrote: `commit_partial` replaces it.

    Raises:
        UserError: one of the paths is a file of the data set in the output folder.
    """
    own = [output / name for name in (*CONTENTS, STAGING)]
    for path in paths:
        where = storage.storage_path(path)
        if storage.is_below(where, output) and any(storage.is_below(where, folder) for folder in own):
            raise UserError(f"the source holds {path}, a file of the data set in {output}: choose another --output")


def publish(output: StoragePath, staged: StoragePath, manifest: Manifest) -> None:
    """Move a finished job into place, and put its manifest there last; `finish_publishing` goes on after a kill."""
    listed = {shard.file for split in (*manifest.splits.values(), manifest.rejected) for shard in split.shards}
    for split in (*SPLITS, REJECTED):  # a worker that was killed leaves files beside the shards
        for file in storage.files_below(staged / split):
            if f"{split}/{file.name}" not in listed:
                file.unlink()
    storage.replace_file(staged / MANIFEST, manifest.to_json().encode("utf-8"))
    _move_into_place(output, staged)


def finish_publishing(output: StoragePath) -> bool:
    """Publish what a killed job had begun to publish; False where there is nothing of the kind."""
    if not storage.exists(output / STAGING):
        return False
    for staged in (output / STAGING).iterdir():
        if storage.exists(staged / MANIFEST):
            _move_into_place(output, staged)
            return True
    return False


def discard(output: StoragePath, key: str) -> None:
    """Remove what a finished job left: one that was killed just after its manifest was in place."""
    storage.remove(output / STAGING / key)
    if storage.exists(output / STAGING) and not any((output / STAGING).iterdir()):
        storage.remove(output / STAGING)


def damage(output: StoragePath, manifest: Manifest) -> str | None:
    """What is wrong with the files that a manifest lists, or None when all are as they were written.

    Raises:
        UnreadableError: one of them cannot be read now, which is no damage.
    """
    listed = [split.shards for split in (*manifest.splits.values(), manifest.rejected)]
    files = [(shard.file, shard.sha256) for part in listed for shard in part]
    try:
        for file, sha256 in [*files, (TOKENIZER, manifest.tokenizer["sha256"])]:
            checked_content(output / file, sha256)
    except UnreadableError:
        raise
    except UserError as error:
        return str(error)
    page = output / REPORT / "report.html"
    return None if storage.exists(page) else f"{page} is missing"


def _move_into_place(output: StoragePath, staged: StoragePath) -> None:
    """Each step may be repeated: what is still staged takes the place of what is there, the manifest last of all."""
    manifest = load_manifest(staged)
    _refuse_others(output)
    absent = {name for name, split in (*manifest.splits.items(), (REJECTED, manifest.rejected)) if not split.shards}
    found = [name for name in SENTENCEPIECE if storage.exists(output / name)]
    others = [name for name in found if END_OF_TEXT not in _beginning(output / name)]
    if manifest.trained_model != "unigram":
        absent |= set(found) - set(others)
    elif others:
        raise UserError(
            f"{output} holds {', '.join(others)}, not written by this program: move what is yours elsewhere"
        )
    (output / MANIFEST).unlink(missing_ok=True)
    for name in CONTENTS:
        if storage.exists(staged / name):
            storage.put(staged / name, output / name)
        elif name in absent:  # what the data set before had
            storage.remove(output / name)
    storage.put(staged / MANIFEST, output / MANIFEST)
    (staged / MANIFEST).unlink(missing_ok=True)  # a copy in a store: half of what lies beside it must not be put again
    storage.remove(output / STAGING)


def _beginning(path: StoragePath) -> str:
    """The first piece of a SentencePiece file, which in ours is the end-of-text token."""
    with path.open("rb") as file:
        return bytes(file.read(64)).decode("utf-8", errors="replace")


def _refuse_foreign(output: StoragePath) -> None:
    """Publishing replaces folders called `train`, `test` or `report`: never somebody else's."""
    manifest = output / MANIFEST
    if storage.exists(manifest):
        text = storage.read(manifest).decode("utf-8", errors="replace")
        is_ours = '"fingerprint"' in text or (_is_torn(text) and _holds_only_shards(output))
    else:  # a job that was stopped while it published leaves its staging folder
        is_ours = storage.exists(output / STAGING)
    foreign = [name for name in (*CONTENTS, MANIFEST) if storage.exists(output / name)]
    if foreign and not is_ours:
        raise UserError(
            f"{output} holds {', '.join(foreign)}, which is no data set of this program: choose another --output"
        )
    _refuse_others(output)


def _refuse_others(output: StoragePath) -> None:
    """What somebody put into a folder of a data set would go with the folder, when another takes its place.

    Raises:
        UserError: a folder that is replaced holds something else than this program wrote there.
    """
    for name in (*SPLITS, REJECTED, REPORT):
        folder = output / name
        is_there = folder.is_dir() if storage.is_local(folder) else storage.exists(folder)
        inside = folder.iterdir() if is_there else ()
        others = sorted(f"{name}/{path.name}" for path in inside if not _OWN_NAME.fullmatch(path.name))
        if others:
            raise UserError(
                f"{output} holds {', '.join(others[:5])}, not written by this program, and {name}/ is replaced: move "
                "what is yours elsewhere, or choose another --output"
            )


def _is_torn(manifest: str) -> bool:
    """Whether it is no whole JSON, as after a full disk, so that nobody else's program can use it either."""
    try:
        json.loads(manifest)
    except ValueError:
        return True
    return False


def _holds_only_shards(output: StoragePath) -> bool:
    files = (file for name in (*SPLITS, REJECTED) for file in storage.files_below(output / name))
    return all(_SHARD_NAME.fullmatch(file.name) for file in files)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # an optional one
        return None


def _unwritable(output: StoragePath, error: Exception) -> UserError:
    return UserError(f"cannot write to {output}: {reason(error)}")
