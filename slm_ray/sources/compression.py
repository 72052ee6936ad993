"""The bytes of a file, decompressed chunk by chunk, so that a file of any size takes the memory of one chunk.

In: an address, and how it is compressed. Out: chunks of what is inside. Called by the formats: by
`scan`, which also watches the bytes as stored, and by `read` for a file that cannot be entered in the middle.
"""

import hashlib
from collections.abc import Callable, Iterator
from typing import BinaryIO

import pyarrow as pa

from slm_ray.errors import UserError
from slm_ray.sources import addresses

CHUNK_BYTES = 1 << 20
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
"""By the last end of a file's name; the one before it names the format."""


class ScanWatch:
    """Receives the bytes of a file as stored: their digest and their number, and a callback that counts along."""

    def __init__(self, on_bytes: Callable[[int], None] | None = None) -> None:
        self.n_bytes = 0
        self._on_bytes = on_bytes
        self._digest = hashlib.sha256()

    def update(self, stored: bytes) -> None:
        """Take the next bytes into account."""
        self._digest.update(stored)
        self.n_bytes += len(stored)
        if self._on_bytes is not None:
            self._on_bytes(len(stored))

    @property
    def sha256(self) -> str:
        """Digest of all bytes received."""
        return self._digest.hexdigest()


def read_chunks(address: str, compression: str, watch: ScanWatch | None = None) -> Iterator[bytes]:
    """What is inside a file, in order, about a megabyte at a time; `compression` is "", "gzip" or "zstd".

    Raises:
        UserError: the file cannot be read, or is damaged or cut short.
    """
    with addresses.reading(address), addresses.open_file(address) as file:
        stored = _Stored(file, watch)
        stream = _decompressed(stored, compression) if compression else stored
        while chunk := _next_chunk(stream, address, compression):
            yield chunk


def chunks_between(address: str, start_byte: int, end_byte: int) -> Iterator[bytes]:
    """The bytes of an uncompressed file from one place to another, or to its end.

    Raises:
        UserError: the file cannot be read.
    """
    with addresses.reading(address), addresses.open_file(address) as file:
        file.seek(start_byte)
        while start_byte < end_byte and (chunk := file.read(min(CHUNK_BYTES, end_byte - start_byte))):
            start_byte += len(chunk)
            yield chunk


class _Stored:
    """A file that hands what is read of it to a `ScanWatch`, if there is one."""

    closed = False

    def __init__(self, file: BinaryIO, watch: ScanWatch | None) -> None:
        self._file = file
        self._watch = watch

    def read(self, n_bytes: int) -> bytes:
        stored = self._file.read(n_bytes)
        if self._watch is not None:
            self._watch.update(stored)
        return stored

    def close(self) -> None:
        self.closed = True


def _decompressed(stored: _Stored, compression: str) -> pa.NativeFile:
    # Arrow's streams notice a file that is cut short and read several members on end; zstandard's reader does not.
    return pa.CompressedInputStream(pa.PythonFile(stored, mode="r"), compression)


def _next_chunk(stream: "_Stored | pa.NativeFile", address: str, compression: str) -> bytes:
    try:
        return bytes(stream.read(CHUNK_BYTES))
    except (pa.ArrowException, OSError) as error:
        if not compression or getattr(error, "errno", None):
            raise
        why = f"{address} is damaged or cut short, or is no {compression} file: {addresses.all_lines(error)}"
        raise UserError(why) from error
