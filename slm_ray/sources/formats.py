"""Which format a file has, by its name. A new format is one module with a `Format`, and one entry here.

In: an address, and options. Out: its `Format`, and how it is compressed. Called by `discovery`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePosixPath

from slm_ray.sources.compression import COMPRESSIONS
from slm_ray.sources.delimited import Delimited
from slm_ray.sources.input_files import Format
from slm_ray.sources.json_lines import JsonLines
from slm_ray.sources.parquet import Parquet
from slm_ray.sources.plain_text import PlainText, SplitOptions


@dataclass(frozen=True, kw_only=True)
class ScanOptions:
    """How files are scanned."""

    text_column: str
    step: int  # rows of a range
    split_options: SplitOptions  # of text files
    on_bytes: Callable[[int], None] | None = None  # receives how many bytes were read since its last call


FORMATS: dict[str, Callable[[ScanOptions], Format]] = {
    ".parquet": lambda options: Parquet(options.text_column),
    ".jsonl": lambda options: JsonLines(options.text_column),
    ".ndjson": lambda options: JsonLines(options.text_column),
    ".json": lambda options: JsonLines(options.text_column, may_be_array=True),
    ".csv": lambda options: Delimited(options.text_column, name="CSV", delimiter=","),
    ".tsv": lambda options: Delimited(options.text_column, name="TSV", delimiter="\t"),
    ".txt": lambda options: PlainText(options.split_options),
    ".text": lambda options: PlainText(options.split_options),
}
"""By the end of a file's name."""

_COMPRESSED_INSIDE = ".parquet"

KNOWN_ENDS = f"{', '.join(FORMATS)} (all but Parquet also with {' or '.join(COMPRESSIONS)} after it)"
"""For messages."""


def may_be_other(address: str) -> bool:
    """Whether a name says little: in a folder with stories, a `.json` file is about them as often as not."""
    return _end(address)[0] == ".json"


def is_known(address: str) -> bool:
    """Whether a file can be read, by its name."""
    end, compression = _end(address)
    return end in FORMATS and not (compression and end == _COMPRESSED_INSIDE)


def format_of(address: str, options: ScanOptions) -> tuple[Format, str]:
    """Format and compression of a known file: `a.jsonl.gz` is `(JsonLines(...), "gzip")`."""
    end, compression = _end(address)
    return FORMATS[end](options), compression


def _end(address: str) -> tuple[str, str]:
    """`a.jsonl.gz` ends in `(".jsonl", "gzip")`."""
    path = PurePosixPath(address)
    compression = COMPRESSIONS.get(path.suffix.lower(), "")
    return (path.with_suffix("") if compression else path).suffix.lower(), compression
