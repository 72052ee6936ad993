"""Token streams mapped from the disk: however large a split is, a worker holds none of it.

In: the shards of a data set. Out: a `TokenStream` whose arrays are one flat file, `.mapped/SPLIT.tokens` beside the
shards (of an object store: in the cache folder), which all workers of a machine share. The file is made once, under a
lock, and put in place by a rename; it says of which shards it is and has a digest, so one that was cut, altered or left
from other shards is made anew. The driver reads it through, once; its workers take its word (`verified`). Where nothing
can be written, the tokens are held in memory instead.
"""

import contextlib
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
from slm_ray.dataset.mapping.turns import turn
from slm_ray.dataset.mapping.verified import is_verified, marks_of, remember
from slm_ray.dataset.packing import StoryIndex
from slm_ray.dataset.shards import split_parts, token_type
from slm_ray.dataset.stream import Tokens, TokenStream
from slm_ray.storage import StoragePath, is_local, json_sha256, storage_path

FOLDER = ".mapped"
FORMAT = 2
HEADER_BYTES, ALIGNMENT = 4096, 64
COPY_BYTES = 2**22


class StaleError(Exception):
    """A mapped file is not that of these shards, or not whole; the message says which."""


def mapped_path(folder: str | StoragePath, split: str) -> Path:
    """Where the mapped file of a split lies."""
    where = storage_path(folder)
    if is_local(where):
        return where / FOLDER / f"{split}.tokens"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    key = hashlib.sha256(where.as_posix().encode()).hexdigest()[:16]
    return cache / "slm-ray" / "tokens" / key / f"{split}.tokens"


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
            f"{mapped_path_text(folder, split)} cannot be used ({_reason(error)}): every worker holds the {split} "
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
    path, wanted, fault = mapped_path(folder, split), _wanted(split, manifest, eos_id), ""
    with contextlib.suppress(FileNotFoundError, StaleError):
        return *_map(path, wanted, trusts=trusts, go_on=None), ""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with turn(path.with_suffix(".lock")) as mine:
            try:  # another process may have made it or read it through meanwhile
                return *_map(path, wanted, trusts=trusts, go_on=mine.go_on), ""
            except FileNotFoundError:
                pass
            except StaleError as error:
                fault = f"{path} {error}: made anew"
            if mine.is_alone:
                for left in path.parent.glob(f".{path.name}.*"):  # of a writer that was killed
                    left.unlink(missing_ok=True)
            _write(path, wanted, split_parts(folder, split, manifest), mine.go_on)
            return *_map(path, wanted, trusts=trusts, go_on=mine.go_on), fault
    except TimeoutError:  # reading needs no turn
        with contextlib.suppress(OSError, StaleError):
            return *_map(path, wanted, trusts=trusts), ""
        raise


def story_index(folder: str | StoragePath, split: str, manifest: Manifest) -> StoryIndex:
    """Where the stories of a split lie: out of the mapped file where there is a good one, else out of the shards.

    Raises:
        UserError: a shard is missing, altered, or not as the manifest counts it.
    """
    with contextlib.suppress(OSError, RuntimeError, StaleError, KeyError):
        eos_id = int(manifest.tokenizer["end_token_id"])
        return _map(mapped_path(folder, split), _wanted(split, manifest, eos_id), trusts=True)[1]
    lengths = [lengths for _, lengths in split_parts(folder, split, manifest)]
    return StoryIndex.of_ends(_ends(lengths))


def _wanted(split: str, manifest: Manifest, eos_id: int) -> dict[str, Any]:
    """What the header of a mapped file must say, out of the manifest alone."""
    shards = manifest.splits[split].shards
    entries = [[shard.file, shard.sha256, shard.rows, shard.tokens] for shard in shards]
    tokenizer = manifest.tokenizer
    return {
        "key": json_sha256([FORMAT, tokenizer["sha256"], tokenizer["vocab_size"], eos_id, entries]),
        "dtype": token_type(manifest).newbyteorder("<").str,
        "tokens": 1 + sum(shard.tokens for shard in shards),
        "stories": sum(shard.rows for shard in shards),
        "first": eos_id,
    }


def _map(
    path: Path, wanted: Mapping[str, Any], *, trusts: bool, go_on: Callable[[], None] | None = lambda: None
) -> tuple[Tokens, StoryIndex]:
    """The arrays of a mapped file, once its header, size and digest were found to be right.

    The digest is found once in a process, or, where it trusts, on a machine; without `go_on` it is not looked for.

    Raises:
        StaleError: they are not.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        header = _header(file.read(HEADER_BYTES), wanted)
        sections, size = _sections(header)
        status = os.fstat(file.fileno())
        if status.st_size != size:
            raise StaleError("was cut short" if status.st_size < size else "has grown")
        marks = marks_of(status, header["sha256"])
        if not is_verified(path, marks, by_others=trusts):
            if go_on is None:
                raise StaleError("was not read through yet")
            if _digest(file, go_on) != header["sha256"]:
                raise StaleError("was altered")
            remember(path, marks)
        whole = np.asarray(np.memmap(file, dtype=np.uint8, mode="r"))
    found = {name: whole[start : start + size].view(kind) for name, (start, size, kind) in sections.items()}
    tokens = found.pop("tokens")
    return tokens, StoryIndex(**found)


def _header(content: bytes, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The header of a mapped file, once it was found to be that of these shards.

    It has a digest of its own. Neither digest is a signature: who may write there can make a file that agrees with
    itself, as who may write the shards and the manifest can.

    Raises:
        StaleError: it is not.
    """
    try:
        found = json.loads(content)
        header = {name: found[name] for name in (*wanted, "lengths", "sha256")}
        is_whole = found["header_sha256"] == json_sha256(header)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise StaleError("is no file of tokens") from error
    if header["key"] != wanted["key"]:
        raise StaleError("belongs to other shards")
    n_lengths = header["lengths"]
    is_as_listed = all(type(header[name]) is type(value) and header[name] == value for name, value in wanted.items())
    if not is_whole or not is_as_listed or type(n_lengths) is not int or not 0 <= n_lengths <= wanted["stories"]:
        raise StaleError("has another header than its shards give")
    return header


def _sections(header: Mapping[str, Any]) -> tuple[dict[str, tuple[int, int, np.dtype[Any]]], int]:
    """Where each array lies, (start, size in bytes, type), and where the last one ends."""
    shapes = {
        "tokens": (header["tokens"], np.dtype(header["dtype"])),
        "ends": (header["stories"] + 1, np.dtype("<i8")),
        "by_length": (header["stories"], np.dtype("<u4")),
        "lengths": (header["lengths"], np.dtype("<i8")),
        "counts": (header["lengths"], np.dtype("<i8")),
    }
    found, start = {}, HEADER_BYTES
    for name, (count, kind) in shapes.items():
        start = -(-start // ALIGNMENT) * ALIGNMENT
        found[name] = (start, count * kind.itemsize, kind)
        start += count * kind.itemsize
    return found, start


def _write(
    path: Path,
    wanted: Mapping[str, Any],
    parts: Iterator[tuple[Tokens, npt.NDArray[np.int64]]],
    go_on: Callable[[], None],
) -> None:
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
            sections, size = _sections(header)
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


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
