"""Token streams mapped from the disk: however large a split is, a worker holds none of it.

In: the shards of a data set. Out: a `TokenStream` whose arrays are one flat file, `.mapped/SPLIT.tokens` beside the
shards (of an object store: in the cache folder), which all workers of a machine share. The file is made once, under a
lock, and put in place by a rename; it says of which shards it is and has a digest, so one that was cut, altered or left
from other shards is made anew. Where nothing can be written, the tokens are held in memory instead.
"""

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from slm_ray.dataset.manifest import Manifest
from slm_ray.dataset.packing import StoryIndex
from slm_ray.dataset.shards import split_parts, token_type
from slm_ray.dataset.stream import Tokens, TokenStream
from slm_ray.storage import StoragePath, is_local, json_sha256, storage_path

FOLDER = ".mapped"
FORMAT = 1
HEADER_BYTES, ALIGNMENT = 4096, 64
COPY_BYTES = 2**20


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

    Raises:
        UserError: a shard is missing, altered, or not as the manifest counts it.
    """
    try:
        tokens, stories, note = _opened(mapped_path(folder, split), folder, split, manifest, eos_id)
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
    """Make the mapped file of a split unless it is there. Returns one line where one had to be made anew, else nothing.

    Raises:
        OSError, RuntimeError: it cannot be written or read there.
        UserError: a shard is missing, altered, or not as the manifest counts it.
    """
    return _opened(mapped_path(folder, split), folder, split, manifest, eos_id)[2]


def _opened(path: Path, folder: str | StoragePath, split: str, manifest: Manifest, eos_id: int) -> tuple[Any, Any, str]:
    """The arrays of a mapped file, which is made unless it is there, and the line of `make_mapped`."""
    key, fault = _key(split, manifest), ""
    try:
        return *_map(path, key), ""
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
    except StaleError as error:
        fault = f"{path} {error}: made anew"
    with _locked(path.with_suffix(".lock")):
        with contextlib.suppress(FileNotFoundError, StaleError):  # another process may have made it meanwhile
            return *_map(path, key), ""
        _write(path, key, split_parts(folder, split, manifest), manifest, eos_id)
    return *_map(path, key), fault


def story_index(folder: str | StoragePath, split: str, manifest: Manifest) -> StoryIndex:
    """Where the stories of a split lie: out of the mapped file where there is a good one, else out of the shards.

    Raises:
        UserError: a shard is missing, altered, or not as the manifest counts it.
    """
    with contextlib.suppress(OSError, RuntimeError, StaleError):
        return _map(mapped_path(folder, split), _key(split, manifest))[1]
    lengths = [lengths for _, lengths in split_parts(folder, split, manifest)]
    return StoryIndex.of_ends(_ends(lengths))


def _key(split: str, manifest: Manifest) -> str:
    """Of all that decides about the content of a mapped file."""
    shards = [[shard.file, shard.sha256, shard.rows, shard.tokens] for shard in manifest.splits[split].shards]
    return json_sha256([FORMAT, manifest.tokenizer["sha256"], manifest.tokenizer["vocab_size"], shards])


def _map(path: Path, key: str) -> tuple[Tokens, StoryIndex]:
    """The arrays of a mapped file, once its header, size and digest were found to be right.

    Raises:
        StaleError: they are not.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        header = _header(file.read(HEADER_BYTES))
        if header["key"] != key:
            raise StaleError("belongs to other shards")
        sections, size = _sections(header)
        if os.fstat(file.fileno()).st_size != size:
            raise StaleError("was cut short" if os.fstat(file.fileno()).st_size < size else "has grown")
        file.seek(HEADER_BYTES)
        digest = hashlib.sha256()
        while part := file.read(COPY_BYTES):
            digest.update(part)
        if digest.hexdigest() != header["sha256"]:
            raise StaleError("was altered")
        whole = np.asarray(np.memmap(file, dtype=np.uint8, mode="r"))
    found = {name: whole[start : start + size].view(kind) for name, (start, size, kind) in sections.items()}
    tokens = found.pop("tokens")
    return tokens, StoryIndex(**found)


def _header(content: bytes) -> dict[str, Any]:
    try:
        header = json.loads(content)
        counts = {name: int(header[name]) for name in ("tokens", "stories", "lengths")}
        return {**counts, "dtype": np.dtype(header["dtype"]), "key": str(header["key"]), "sha256": header["sha256"]}
    except (ValueError, KeyError, TypeError) as error:
        raise StaleError("is no file of tokens") from error


def _sections(header: Mapping[str, Any]) -> tuple[dict[str, tuple[int, int, np.dtype[Any]]], int]:
    """Where each array lies, (start, size in bytes, type), and where the last one ends."""
    shapes = {
        "tokens": (header["tokens"], header["dtype"]),
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


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Let one process at a time in. Without locks on that disk several make the same file, and the last one counts."""
    with path.open("ab") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write(
    path: Path,
    key: str,
    parts: Iterator[tuple[Tokens, npt.NDArray[np.int64]]],
    manifest: Manifest,
    eos_id: int,
) -> None:
    """Write a mapped file, a shard at a time, and put it in its place. Raises: OSError."""
    kind = token_type(manifest).newbyteorder("<")
    beside = path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}")
    try:
        with beside.open("w+b") as file:
            file.seek(HEADER_BYTES)
            file.write(np.array([eos_id], kind).tobytes())
            n_tokens, lengths = 1, []
            for tokens, of_shard in parts:
                file.write(tokens.astype(kind, copy=False).data)
                n_tokens += len(tokens)
                lengths.append(of_shard)
            index = StoryIndex.of_ends(_ends(lengths))
            header = {
                "key": key,
                "dtype": kind.str,
                "tokens": n_tokens,
                "stories": len(index),
                "lengths": len(index.lengths),
            }
            sections, size = _sections(header | {"dtype": kind})
            for name, (start, _, its_kind) in itertools.islice(sections.items(), 1, None):
                file.seek(start)
                file.write(getattr(index, name).astype(its_kind, copy=False).tobytes())
            file.truncate(size)
            header["sha256"] = _digest(file)
            file.seek(0)
            file.write(json.dumps(header).encode().ljust(HEADER_BYTES - 1) + b"\n")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _digest(file: BinaryIO) -> str:
    """sha256 of what lies behind the header."""
    file.flush()
    file.seek(HEADER_BYTES)
    digest = hashlib.sha256()
    while part := file.read(COPY_BYTES):
        digest.update(part)
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
