"""Where inputs lie: on this machine, or at any address that fsspec knows (`s3://`, `gs://`, `memory://`).

In: the words of `--source`: files, folders and globs. Out: the address of each file, its name for story ids, and its
bytes. Called by `discovery` while planning and by the format modules while reading, which need not know the place.
"""

import contextlib
import glob
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from slm_ray.errors import UserError
from slm_ray.storage import is_remote, stored_files

LOGGER = logging.getLogger(__name__)
_SHOWN = 5  # names in a message

BLOCK_BYTES = 4 << 20
"""Read ahead of a remote file: it costs much more than one answer takes, and little of a worker's memory."""


def open_file(address: str) -> BinaryIO:
    """Open for reading, with `seek`. Errors are those of the file system: call and read inside `reading`."""
    if not is_remote(address):
        return Path(address).open("rb")
    import fsspec

    system, path = fsspec.url_to_fs(address)
    return cast(BinaryIO, system.open(path, "rb", block_size=BLOCK_BYTES, cache_type="readahead"))


def stamp(address: str) -> str:
    """What changes when a file is altered, without reading it: its size, and its time on a disk, its ETag in a store.

    Errors are those of the file system: call inside `reading`.
    """
    if not is_remote(address):
        status = Path(address.removeprefix("file://")).stat()
        return f"{status.st_size} bytes of {status.st_mtime_ns}"
    import fsspec

    system, path = fsspec.url_to_fs(address)
    system.invalidate_cache()  # what was listed while planning says nothing about now
    info = system.info(path)
    return f"{info['size']} bytes {info.get('ETag') or info.get('etag') or ''}"


@contextlib.contextmanager
def reading(address: str) -> Iterator[None]:
    """Turn whatever goes wrong with an address inside the block into one line.

    Raises:
        UserError: the file is not there, may not be read, or the file system does not answer.
    """
    try:
        yield
    except UserError:
        raise
    except ImportError as error:  # fsspec says which package to install
        raise UserError(f"cannot read {address}: {all_lines(error)}") from error
    except OSError as error:
        raise UserError(f"cannot read {address}: {error.strerror or all_lines(error)}") from error
    except RuntimeError as error:  # ~name of nobody
        raise UserError(f"cannot read {address}: {all_lines(error)}") from error
    except Exception as error:  # every object store has its own family of exceptions
        if not is_remote(address):
            raise
        raise UserError(f"cannot read {address}: {all_lines(error)}") from error


def expand(
    words: Sequence[str],
    is_known: Callable[[str], bool],
    known: str,
    may_be_other: Callable[[str], bool] = lambda _address: False,
) -> list[str]:
    """The files that some words name, each once, sorted: a folder means all files below it that `is_known`.

    `known` is for messages: the ends of names that are known. Of those in a folder, what `may_be_other` is taken only
    where nothing else is known.

    Raises:
        UserError: a word names nothing, or a file that is not known.
    """
    found: set[str] = set()
    for word in words:
        with reading(word):
            files, is_folder = _remote_files(word) if is_remote(word) else _local_files(word)
        if is_folder:
            others = sorted(file for file in files if not is_known(file))
            files = [file for file in files if is_known(file)]
            if files and others:
                _warn_skipped(word, others, f"end in none of {known}")
            about = sorted(file for file in files if may_be_other(file))
            if 0 < len(about) < len(files):
                files = [file for file in files if not may_be_other(file)]
                _warn_skipped(word, about, "may be about the stories beside them (name them to read them)")
            if not files:
                raise UserError(f"no file in the folder {word} ends in {known}")
        if not files:
            raise UserError(f"no such file, folder or glob: {word} (or use auto, sample, hub:NAME)")
        for file in files:
            if not is_known(file):
                raise UserError(f"{file}: expected a file that ends in {known}")
        found.update(files)
    return sorted(found)


def _warn_skipped(word: str, skipped: Sequence[str], why: str) -> None:
    shown = ", ".join(PurePosixPath(_bare(name)).name for name in skipped[:_SHOWN])
    more = f" and {len(skipped) - _SHOWN} more" if len(skipped) > _SHOWN else ""
    LOGGER.warning("%s: skipped %d that %s: %s%s", word, len(skipped), why, ascii(shown)[1:-1], more)


def names(addresses: Sequence[str]) -> list[str]:
    """The path of each file below their common folder: a name that does not depend on where that folder lies.

    `["/x/a/1.txt", "/x/b/1.txt"]` become `["a/1.txt", "b/1.txt"]`. Each file system (a disk and a bucket) has a common
    folder of its own; its name comes before that of a file where two would be equal. Bytes that are not UTF-8 are
    written out, as `\\xff`: names go into the manifest and the story ids.
    """
    places: dict[str, list[str]] = {}
    for address in addresses:
        places.setdefault(_place(address), []).append(address)
    named: dict[str, str] = {}
    for place, inside in sorted(places.items()):
        paths = [PurePosixPath(_bare(address)) for address in inside]
        common = os.path.commonpath([path.parent for path in paths])
        for address, path in zip(inside, paths, strict=True):
            name = as_text(path.relative_to(common).as_posix())
            named[address] = f"{place}/{name}" if name in named.values() else name
    return [named[address] for address in addresses]


def as_text(name: str) -> str:
    """A name of a file or of the command line, whatever its bytes and the locale's encoding: UTF-8 or written out."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def all_lines(error: Exception) -> str:
    """All lines of an exception as one, at most 200 characters; its kind where it has no text."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def _local_files(word: str) -> tuple[list[str], bool]:
    path = Path(word.removeprefix("file://")).expanduser()
    if path.is_dir():
        visible = [file for file in _below(path) if not _is_hidden(file.relative_to(path))]
        inside = [file for file in visible if file.is_file()]
        links = sorted(str(file) for file in visible if file.is_symlink() and not file.is_file())
        if inside and links:
            _warn_skipped(word, links, "are links to a folder or to nothing")
        return [_absolute(file) for file in inside], True
    if path.is_file():
        return [_absolute(path)], False
    found = glob.glob(str(path), recursive=True)  # noqa: PTH207 - Path.glob takes no absolute pattern
    files = [name for name in found if Path(name).is_file()]
    others = sorted(set(found) - set(files))
    if files and others and "**" not in word:  # which finds folders too, and all that is in them
        _warn_skipped(word, others, "are no files (name a folder itself to read what is in it)")
    return [_absolute(name) for name in files], False


def _below(folder: Path) -> Iterator[Path]:
    """All that lies below a folder. Raises OSError for one that cannot be read, which `rglob` passes over."""

    def refuse(error: OSError) -> None:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from error

    for place, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(place, name) for name in (*folders, *files))


def _absolute(path: str | Path) -> str:
    # Not resolved: a link keeps its name, which says what it is (the hub's cache links to files without one).
    return os.path.abspath(path)  # noqa: PTH100 - absolute() keeps ".."


def _remote_files(word: str) -> tuple[list[str], bool]:
    try:
        return _found_by_fsspec(word)
    except FileNotFoundError as error:
        raise UserError(f"no such file, folder or glob: {word} ({all_lines(error)})") from error


def _found_by_fsspec(word: str) -> tuple[list[str], bool]:
    import fsspec

    system, path = fsspec.url_to_fs(word)
    if glob.has_magic(path):
        found = [name for name, entry in system.glob(path, detail=True).items() if entry["type"] == "file"]
        # As on a disk, a star takes no hidden file.
        return [_full(system, name) for name in found if "/." in path or "/." not in name], False
    if system.info(path)["type"] == "file":
        return [_full(system, path)], False
    below = stored_files(system, path)
    root = system.info(path)["name"].strip("/")
    inside = [name for name in below if not _is_hidden(PurePosixPath(name.strip("/")).relative_to(root))]
    return [_full(system, name) for name in inside], True


def _full(system: Any, path: str) -> str:
    return str(system.unstrip_protocol(path))


def _is_hidden(path: Path | PurePosixPath) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _place(address: str) -> str:
    return address.split("://")[0] if is_remote(address) else ""


def _bare(address: str) -> str:
    return "/" + address.split("://", 1)[1].lstrip("/") if is_remote(address) else address
