"""Where files lie: a folder of this machine, or the address of an object store (`s3://`, `gs://`), used alike.

In: a path or an address. Out: a `StoragePath`, which reads and writes like a `pathlib.Path`, and the few operations in
which the two differ. Everything of a data set is read and written through here.
"""

import errno
import hashlib
import json
import math
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias, TypeGuard

from upath import UPath

from slm_ray.errors import UserError

StoragePath: TypeAlias = Path | UPath
"""A `Path` for this machine, a `UPath` for anything else."""
PART_BYTES = 2**20
"""Of a file that is read as it comes."""


class TooLargeError(ValueError):
    """A file is larger than any that is meant."""


def storage_path(address: str | StoragePath) -> StoragePath:
    """What an address or path stands for; a relative path is taken from the working folder.

    Raises:
        UserError: no file system of that name is known, or the package that reaches it is not installed.
    """
    if isinstance(address, Path | UPath):
        return address
    if not address:
        raise UserError("a path is an empty word: name a folder, or an address such as s3://BUCKET/FOLDER")
    if "\0" in address:
        raise UserError(f"{address!r}: no path has a zero byte in it")
    if "://" not in address:
        return _local(address)
    if address.startswith("file://"):
        return Path(address.removeprefix("file://"))
    try:
        # Other processes write there too: what was listed before says nothing about now.
        return UPath(address, use_listings_cache=False)
    except (ImportError, ValueError) as error:
        raise UserError(f"cannot reach {address}: {error}") from error


def _local(address: str) -> Path:
    try:
        return Path(address).expanduser().absolute()
    except RuntimeError as error:  # ~name of nobody
        raise UserError(f"{address}: {error}") from error


def is_local(where: StoragePath) -> TypeGuard[Path]:
    """Whether it lies on this machine, so that it can be locked, mapped and renamed."""
    return isinstance(where, Path)


def is_remote(address: str) -> bool:
    """Whether an address leads to an object store."""
    return "://" in address and not address.startswith("file://")


def cache_folder() -> Path:
    """Where this user keeps what can be made again. Raises: RuntimeError where there is no home."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "slm-ray"


def is_below(where: StoragePath, folder: StoragePath) -> bool:
    """Whether it is that folder or lies in it; links on this machine are followed."""
    if isinstance(where, Path) and isinstance(folder, Path):
        return where.resolve().is_relative_to(folder.resolve())
    ours, other = where.as_posix().rstrip("/"), folder.as_posix().rstrip("/")
    return f"{ours}/".startswith(f"{other}/")


def make_folder(folder: StoragePath) -> None:
    """Make it, with those above it. An object store has no folders, and a bucket is not made by the way."""
    if isinstance(folder, Path):
        folder.mkdir(parents=True, exist_ok=True)


def replace_file(path: StoragePath, content: bytes | memoryview) -> None:
    """Put a file in place at once: readers see the old one or the new one, never a part.

    An object store does that by itself; on a disk it is written beside and renamed.
    """
    if not isinstance(path, Path):
        path.write_bytes(bytes(content))
        return
    beside = path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}")
    try:
        beside.write_bytes(content)
        beside.rename(path)
    finally:
        beside.unlink(missing_ok=True)


def exists(path: StoragePath) -> bool:
    """Whether it is there. Raises what the file system raises where that cannot be said: fsspec's own says no then."""
    if isinstance(path, Path):
        return path.exists()
    try:
        path.fs.info(path.path)
    except FileNotFoundError:
        return False
    return True


def files_below(folder: StoragePath) -> Iterator[StoragePath]:
    """All files in a folder and its folders; none where there is no folder. Raises as `exists`, and leaves none out."""
    is_there = exists(folder)
    if isinstance(folder, Path):
        yield from (path for path in folder.rglob("*") if is_there and path.is_file())
    elif is_there:
        root = str(folder.fs.info(folder.path)["name"])
        yield from (folder / _below_root(path, root) for path in stored_files(folder.fs, folder.path))
    else:
        folder.fs.find(folder.path)  # asked even where nothing is there: a bucket that does not exist is an error


def read(path: StoragePath) -> bytes:
    """A file's content; of one that its owner writes anew meanwhile, that before or that after.

    A store's `open` asks for the file's size and then refuses any later version of it, and fsspec's `cat_file` asks for
    a large one in parts, of whatever version: so all of it is asked for in one request. Raises what the file system
    raises.
    """
    return path.read_bytes() if isinstance(path, Path) else _content(path)


def read_if_there(path: StoragePath) -> bytes:
    """As `read`, or nothing where there is no file. Raises as `exists`."""
    try:
        return read(path)
    except FileNotFoundError:
        return b""


def read_at_most(path: StoragePath, most: int) -> bytes:
    """As `read`, of a file that anybody may have made. Raises: TooLargeError, before more than `most` bytes are in
    memory; and what the file system raises."""
    if isinstance(path, Path):
        with path.open("rb") as file:
            content = file.read(most + 1)
    else:
        content = _content(path, most)
    if len(content) > most:
        raise TooLargeError(f"it is larger than {most} bytes")
    return content


def _content(path: UPath, most: int | None = None) -> bytes:
    """What a store has there, or the first `most` + 1 bytes of it."""
    if path.protocol in ("http", "https"):  # a server may send all where a part is asked for, and say any size
        return _streamed(path, most, size=1, block_size=0)  # a GET alone
    found = path.fs.info(path.path)
    if found.get("type") == "directory":
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path.as_posix())
    size = found.get("size")
    if not size:  # a store has no part of nothing, and one that does not say the size may not know parts
        return _streamed(path, most)
    if most is None:
        return bytes(path.fs.cat_file(path.path, start=0))
    if size > most:
        raise TooLargeError(f"it is larger than {most} bytes")
    return bytes(path.fs.cat_file(path.path, start=0, end=most + 1))


def _streamed(path: UPath, most: int | None, **way: int) -> bytes:
    """The same, as it comes: nobody's word about its size is believed."""
    parts, missing = list[bytes](), math.inf if most is None else most + 1
    with path.fs.open(path.path, "rb", **way) as file:
        while missing and (part := file.read(int(min(missing, PART_BYTES)))):
            parts.append(part)
            missing -= len(part)
    return b"".join(parts)


def stored_files(system: Any, path: str) -> list[str]:
    """The paths of all files below a folder of an object store.

    Raises what the store raises: fsspec's own `find` and `walk` leave out a folder that cannot be listed, below the
    first whatever is asked of them.
    """
    files: list[str] = []
    folders = [path.rstrip("/")]
    while folders:
        folder = folders.pop()
        for found in system.ls(folder, detail=True):
            name = found["name"].rstrip("/")
            if name.strip("/") == folder.strip("/"):  # what stands for the folder itself in some stores
                continue
            (folders if found["type"] == "directory" else files).append(name)
    return sorted(files)


def remove(path: StoragePath) -> None:
    """A file, or a folder with all that is in it; nothing where there is nothing."""
    if isinstance(path, Path):
        if path.is_dir() and not path.is_symlink():  # of a link, the link alone is ours
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    elif exists(path):
        path.fs.rm(path.path, recursive=True)


def put(source: StoragePath, target: StoragePath) -> None:
    """Let a file or folder stand where another one may be; repeated after an interruption, it goes on.

    One rename on a disk. In an object store every file is copied, which leaves the source, and what else was there
    is removed.
    """
    if isinstance(source, Path):
        remove(target)
        source.rename(str(target))
    elif source.fs.info(source.path)["type"] == "file":
        target.write_bytes(read(source))
    else:
        new = {_below(file, source): file for file in files_below(source)}
        for name, file in new.items():
            (target / name).write_bytes(read(file))
        for file in files_below(target):
            if _below(file, target) not in new:
                file.unlink()


def _below(file: StoragePath, folder: StoragePath) -> str:
    """`a/b.txt` of the file `s3://bucket/folder/a/b.txt`."""
    return _below_root(file.as_posix(), folder.as_posix())


def _below_root(path: str, root: str) -> str:
    return path.removeprefix(root).lstrip("/")


def file_sha256(path: StoragePath) -> str:
    """sha256 of a file's content, read in parts."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]  # fsspec's can readinto too


def json_sha256(content: Any) -> str:
    """sha256 of a value's one JSON form: sorted keys, no spaces, UTF-8."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
