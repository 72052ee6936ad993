"""What planning and reading hand on: files, what a scan found, and the ranges that workers read.

In: nothing. Out: the types that `plan`, `reading` and the formats share. All of them but `ScanResult` are pickled
with each work item, so they are small: a file's borders stay in the planning process.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import pyarrow as pa

from slm_ray.sources.compression import ScanWatch

RANGE_BYTES = 1 << 24
"""No range has more, but for its last story: 4,000 TinyStories are 3 MB, and as many chapters of books 100 MB."""

Texts = tuple[pa.Array, pa.Array]
"""The bytes of some stories, and their problems (null: none)."""


class Format(Protocol):
    """How files of one kind are scanned and read; a frozen dataclass with the options that decide about its rows.

    A fault of the whole file is a `UserError`; a fault of one row is that row's problem, with its bytes as evidence.
    """

    @property
    def cut(self) -> str:
        """What besides the content determines the rows, for the manifest; "": nothing."""

    def scan(self, file: "InputFile", step: int, watch: ScanWatch) -> "ScanResult":
        """Read a file once: digest, number of rows, and where each range begins: after `step` rows, or
        `RANGE_BYTES` of text. `watch` receives the bytes.

        Raises:
            UserError: the file is empty or damaged, is not what its name says, or has no such column.
        """

    def read(self, ranges: "Sequence[InputRange]") -> Iterator[Texts]:
        """The rows of each range, as soon as it is complete. The ranges are of one file, in order, perhaps with gaps.

        Raises:
            UserError: the file cannot be read.
        """


@dataclass(frozen=True, kw_only=True)
class InputFile:
    """One input, as its ranges carry it."""

    format: Format
    name: str  # first part of the story ids; no absolute path
    path: str  # or address
    compression: str = ""  # gzip or zstd
    stamp: str = ""  # of addresses.stamp, before the scan; not in the manifest, as it depends on the place; "": none
    split: str | None = None  # all rows belong to this split; None: by hash of the text


@dataclass(frozen=True, kw_only=True)
class ScanResult:
    """A file and what one pass over it found."""

    file: InputFile  # its format with what the scan settled
    sha256: str  # of what determines the rows
    n_rows: int
    first_rows: tuple[int, ...]  # of the ranges
    borders: tuple[int, ...] = ()  # byte where each range begins, then the end; () where none can be entered
    units: tuple[int, ...] = ()  # for each range what it is read together with; (): all are, without borders


@dataclass(frozen=True, kw_only=True)
class InputRange:
    """Some consecutive rows of one input: one work item, and one shard of each split."""

    number: int  # names the shards
    file: InputFile
    first_row: int  # within the input
    n_rows: int
    start_byte: int = 0  # where the first row begins
    end_byte: int = 0  # and the last one ends; 0: the file has to be read from its beginning
    unit: int = 0  # ranges of one input that have the same are read together

    @property
    def rows(self) -> range:
        """Numbers of the rows in their input."""
        return range(self.first_row, self.first_row + self.n_rows)
