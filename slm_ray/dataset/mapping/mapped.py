"""Token streams mapped from the disk: however large a split is, a worker holds none of it.

In: the shards of a data set. Out: a `TokenStream` whose arrays are one flat file, `.mapped/SPLIT.tokens` beside the
shards (of an object store, and where this user only reads: in the cache folder), which a machine's workers share. The
file is made once, under a lock, and put in place by a rename; it says of which shards it is and has a digest, so one
that was cut, altered or left from other shards is made anew. The driver reads it through, once; its workers take its
word (`verified`). One that this machine has not made or seen since its start, as that of a copied data set, is compared
with the shards first: its own digest says nothing about who made it. Where nothing can be written, the tokens are held
in memory instead.
"""

import contextlib
import dataclasses
import errno
import functools
import hashlib
import itertools
import json
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from slm_ray.dataset.manifest import Manifest
from slm_ray.dataset.mapping.header import HEADER_BYTES, StaleError, read_header, sections_of, wanted_header
from slm_ray.dataset.mapping.turns import turn
from slm_ray.dataset.mapping.verified import is_verified, marks_of, remember
from slm_ray.dataset.packing import StoryIndex
from slm_ray.dataset.shards import split_parts, token_type
from slm_ray.dataset.stream import Tokens, TokenStream
from slm_ray.errors import reason
from slm_ray.storage import StoragePath, cache_folder, is_local, json_sha256, storage_path

FOLDER = ".mapped"
COPY_BYTES = 2**22
NOT_OURS = (errno.EACCES, errno.EPERM, errno.EROFS)
"""How a place is refused that this user cannot write to."""
Parts = Iterator[tuple[Tokens, npt.NDArray[np.int64]]]
"""The tokens of each shard, and the lengths of its stories."""


def mapped_path(folder: str | StoragePath, split: str) -> Path:
    """Where the mapped file of a split lies."""
    where = storage_path(folder)
    return where / FOLDER / f"{split}.tokens" if is_local(where) else _cached_path(where, split)


def _cached_path(where: StoragePath, split: str) -> Path:
    key = hashlib.sha256(where.as_posix().encode()).hexdigest()[:16]
    return cache_folder() / "tokens" / key / f"{split}.tokens"


def _places(folder: str | StoragePath, split: str) -> Iterator[Path]:
    """Where it may lie: of a data set that this user only reads, in the cache folder too."""
    yield mapped_path(folder, split)
    if is_local(where := storage_path(folder)):
        with contextlib.suppress(RuntimeError):  # no home has no cache
            yield _cached_path(where, split)


def open_split(folder: str | StoragePath, split: str, manifest: Manifest, eos_id: int) -> tuple[TokenStream, str]:
    """The token stream of a split, and one line on what was out of the ordinary, empty where nothing was.

    Workers open with this: a file that another process of this machine, as a rule the driver, read through and found
    whole is not read through again (`verified`); header, size and time of change are checked. On another machine the
    first worker does it for all of its machine.

    Raises:
        UserError: a shard is missing, altered, or not as the manifest counts it.
    """
    try:
        tokens, stories, note = _opened(folder, split, manifest, eos_id, trusts=True)
    except (OSError, RuntimeError, StaleError) as error:  # no home has no cache; another driver may replace the data
        tokens, stories = _in_memory(folder, split, manifest, eos_id)
        note = (
            f"{mapped_path_text(folder, split)} cannot be used ({reason(error)}): every worker holds the {split} "
            f"split in memory, {tokens.nbytes / 1e6:,.1f} MB"
        )
    return TokenStream(tokens, manifest.splits[split].bytes, stories), note


def mapped_path_text(folder: str | StoragePath, split: str) -> str:
    """`mapped_path` as text, of a user without a home too."""
    try:
        return str(mapped_path(folder, split))
    except RuntimeError:
        return f"a file of the {split} split's tokens"


def make_mapped(folder: str | StoragePath, split: str, manifest: Manifest, eos_id: int) -> str:
    """Make the mapped file of a split unless it is there, and read it through, once in a process.

    Returns one line where one had to be made anew, else nothing.

    Raises:
        OSError, RuntimeError: it cannot be written or read there.
        UserError: a shard is missing, altered, or not as the manifest counts it.
    """
    return _opened(folder, split, manifest, eos_id, trusts=False)[2]


def _opened(
    folder: str | StoragePath, split: str, manifest: Manifest, eos_id: int, *, trusts: bool
) -> tuple[Tokens, StoryIndex, str]:
    """The arrays of a mapped file, which is made unless it is there, and the line of `make_mapped`.

    trusts: whether it is enough that another process of this machine read it through.
    """
    wanted, parts = wanted_header(split, manifest, eos_id), functools.partial(split_parts, folder, split, manifest)
    refused: OSError | None = None
    for path in _places(folder, split):
        try:
            return _opened_at(path, wanted, parts, trusts=trusts)
        except OSError as error:
            if error.errno not in NOT_OURS:
                raise
            refused = refused or error
    assert refused is not None
    raise refused


def _opened_at(
    path: Path, wanted: Mapping[str, Any], parts: Callable[[], Parts], *, trusts: bool
) -> tuple[Tokens, StoryIndex, str]:
    """As `_opened`, at one place."""
    fault = ""
    with contextlib.suppress(FileNotFoundError, StaleError):
        return *_map(path, wanted, parts, trusts=trusts, go_on=None), ""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with turn(path.with_suffix(".lock")) as mine:
            try:  # another process may have made it or read it through meanwhile
                return *_map(path, wanted, parts, trusts=trusts, go_on=mine.go_on), ""
            except FileNotFoundError:
                pass
            except StaleError as error:
                fault = f"{path} {error}: made anew"
            if mine.is_alone:
                for left in path.parent.glob(f".{path.name}.*"):  # of a writer that was killed
                    left.unlink(missing_ok=True)
            _write(path, wanted, parts(), mine.go_on)
            return *_map(path, wanted, parts, trusts=trusts, go_on=mine.go_on), fault
    except TimeoutError:  # reading needs no turn
        with contextlib.suppress(OSError, StaleError):
            return *_map(path, wanted, parts, trusts=trusts), ""
        raise


def story_index(folder: str | StoragePath, split: str, manifest: Manifest) -> StoryIndex:
    """Where the stories of a split lie: out of the mapped file where there is a good one, else out of the shards.

    Raises:
        UserError: a shard is missing, altered, or not as the manifest counts it.
    """
    parts = functools.partial(split_parts, folder, split, manifest)
    with contextlib.suppress(RuntimeError, KeyError):
        wanted = wanted_header(split, manifest, int(manifest.tokenizer["end_token_id"]))
        for path in _places(folder, split):
            with contextlib.suppress(OSError, StaleError):
                return _map(path, wanted, parts, trusts=True)[1]
    lengths = [lengths for _, lengths in parts()]
    return StoryIndex.of_ends(_ends(lengths))


def _map(
    path: Path,
    wanted: Mapping[str, Any],
    parts: Callable[[], Parts],
    *,
    trusts: bool,
    go_on: Callable[[], None] | None = lambda: None,
) -> tuple[Tokens, StoryIndex]:
    """The arrays of a mapped file, once its header, size and digest were found to be right, and on a machine that does
    not know it, its arrays those of its shards.

    The digest is found once in a process, or, where it trusts, on a machine; without `go_on` it is not looked for.

    Raises:
        StaleError: they are not.
        OSError: it cannot be read.
        UserError: it is compared with its shards, and one is missing, altered, or not as the manifest counts it.
    """
    with path.open("rb") as file:
        header = read_header(file.read(HEADER_BYTES), wanted)
        sections, size = sections_of(header)
        status = os.fstat(file.fileno())
        if status.st_size != size:
            raise StaleError("was cut short" if status.st_size < size else "has grown")
        marks = marks_of(status, header["sha256"])
        is_known = is_verified(path, marks, by_others=trusts)
        if not is_known and go_on is None:
            raise StaleError("was not read through yet")
        if not is_known and _digest(file, go_on or _nothing) != header["sha256"]:
            raise StaleError("was altered")
        whole = np.asarray(np.memmap(file, dtype=np.uint8, mode="r"))
    found = {name: whole[start : start + size].view(kind) for name, (start, size, kind) in sections.items()}
    tokens, stories = found.pop("tokens"), StoryIndex(**found)
    if not is_known:
        if not is_verified(path, marks, by_others=True):
            _compare(tokens, stories, wanted["first"], parts(), go_on or _nothing)
        remember(path, marks)
    return tokens, stories


def _nothing() -> None:
    pass


def _compare(tokens: Tokens, stories: StoryIndex, first_token: int, parts: Parts, go_on: Callable[[], None]) -> None:
    """Raises: StaleError where the arrays of a file are not what its shards give."""
    is_equal, first, lengths = int(tokens[0]) == first_token, 1, []
    for part, of_shard in parts:
        is_equal = is_equal and np.array_equal(tokens[first : first + len(part)], part)
        first += len(part)
        lengths.append(of_shard)
        go_on()
    own = StoryIndex.of_ends(_ends(lengths))
    names = [field.name for field in dataclasses.fields(StoryIndex)]
    if not (is_equal and all(np.array_equal(getattr(own, name), getattr(stories, name)) for name in names)):
        raise StaleError("has other tokens than its shards")


def _write(path: Path, wanted: Mapping[str, Any], parts: Parts, go_on: Callable[[], None]) -> None:
    """Write a mapped file, a shard at a time, and put it in its place. Raises: OSError."""
    kind = np.dtype(wanted["dtype"])
    beside = path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}")
    try:
        with beside.open("w+b") as file:
            file.seek(HEADER_BYTES)
            file.write(np.array([wanted["first"]], kind).tobytes())
            lengths = []
            for tokens, of_shard in parts:
                file.write(tokens.astype(kind, copy=False).data)
                lengths.append(of_shard)
                go_on()
            index = StoryIndex.of_ends(_ends(lengths))
            header = {**wanted, "lengths": len(index.lengths)}
            sections, size = sections_of(header)
            for name, (start, _, its_kind) in itertools.islice(sections.items(), 1, None):
                file.seek(start)
                file.write(getattr(index, name).astype(its_kind, copy=False).tobytes())
            file.truncate(size)
            header["sha256"] = _digest(file, go_on)
            header["header_sha256"] = json_sha256(header)
            file.seek(0)
            file.write(json.dumps(header).encode().ljust(HEADER_BYTES - 1) + b"\n")
        marks = marks_of(beside.stat(), header["sha256"])
        beside.replace(path)
        remember(path, marks)
    finally:
        beside.unlink(missing_ok=True)


def _digest(file: BinaryIO, go_on: Callable[[], None]) -> str:
    """sha256 of what lies behind the header."""
    file.flush()
    file.seek(HEADER_BYTES)
    digest = hashlib.sha256()
    while part := file.read(COPY_BYTES):
        digest.update(part)
        go_on()
    return digest.hexdigest()


def _ends(lengths: list[npt.NDArray[np.int64]]) -> npt.NDArray[np.int64]:
    """(stories + 1,): the stories' borders, from their lengths by shard."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(np.concatenate([np.zeros(0, np.int64), *lengths]))])


def _in_memory(folder: str | StoragePath, split: str, manifest: Manifest, eos_id: int) -> tuple[Tokens, StoryIndex]:
    tokens: Tokens = np.empty(1 + manifest.splits[split].tokens, token_type(manifest))
    tokens[0], first, lengths = eos_id, 1, []
    for part, of_shard in split_parts(folder, split, manifest):
        tokens[first : first + len(part)] = part
        first += len(part)
        lengths.append(of_shard)
    return tokens, StoryIndex.of_ends(_ends(lengths))
