"""What `--source` means, cut into fixed input ranges.

In: `auto`, `sample`, `hub:NAME`, or a file, folder or glob of Parquet, JSONL and plain text. Out: a `Plan`,
whose ranges are the work items of the pipeline, and `read_range`, which reads one of them anywhere. The first
step of the flow. Ranges and story ids are functions of the input alone, so every run has the same work items.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from slm_ray import formats, hub
from slm_ray.errors import UserError
from slm_ray.inputs import Found, InputFile, Scanner
from slm_ray.shards import json_sha256

ROWS_PER_RANGE = 4000
"""Stories of one work item: 3 MB of TinyStories, so that two workers share 20,000 stories evenly."""

RAW_SCHEMA = pa.schema(
    [
        pa.field("story_id", pa.string(), nullable=False),
        pa.field("text", pa.large_binary()),
        pa.field("problem", pa.string()),
    ]
)
"""Rows as read: the story's bytes, or with a `problem` (a reason of `text.REASONS`) whatever stood there."""


@dataclass(frozen=True, kw_only=True)
class InputRange:
    """Some consecutive rows of one input: one work item, and one shard of each split."""

    number: int  # names the shards
    kind: str
    source_name: str
    path: str
    first_row: int  # within the input
    n_rows: int
    start_byte: int  # JSONL and text: where the first row begins
    end_byte: int
    separator: str
    text_column: str
    seed: int  # of the sample corpus
    split: str | None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All work items of a job, and what the manifest says about the source."""

    ranges: tuple[InputRange, ...]
    source: dict[str, Any]  # requested, used, why, revision, digest, files

    @property
    def tasks(self) -> tuple[tuple[InputRange, ...], ...]:
        """The ranges that are read together."""
        return tuple((part,) for part in self.ranges)

    @property
    def n_rows(self) -> int:
        """Stories that will be read."""
        return sum(part.n_rows for part in self.ranges)

    @property
    def has_own_validation(self) -> bool:
        """Whether the source brings a validation split, so that none is taken from the rest."""
        return any(part.split == "validation" for part in self.ranges)


def plan(
    source: str,
    *,
    validation_source: str | None = None,
    max_stories: int | None = None,
    text_column: str = "text",
    seed: int = 0,
    rows_per_range: int = ROWS_PER_RANGE,
    download_folder: Path | None = None,
) -> Plan:
    """Find the inputs, read each file once, and cut them into ranges.

    `max_stories` takes the first stories of `source` (None: 20,000 of `auto`'s hub data set, 6,000 of the
    sample corpus, all of anything else). `download_folder` receives what the hub sends.

    Raises:
        UserError: the source does not exist, is empty, or cannot be read; says which and what to do.
    """
    if max_stories is not None and max_stories < 1:
        raise UserError(f"max_stories ({max_stories}) must be at least 1")
    scan = Scanner(text_column=text_column, step=rows_per_range, seed=seed, folder=download_folder)
    found = scan.find(source, max_stories)
    files = _first(found.files, max_stories)
    if validation_source is not None:
        validation = [replace(file, split="validation") for file in scan.find(validation_source, None).files]
        files = [file for file in files if file.split is None] + _renamed(validation, files)
    ranges = itertools.chain.from_iterable(_cut(file, rows_per_range, text_column, seed) for file in files)
    numbered = tuple(replace(part, number=number) for number, part in enumerate(ranges))
    return Plan(ranges=numbered, source=_describe(source, found, files))


def read_ranges(task: tuple[InputRange, ...]) -> Iterator[tuple[InputRange, pa.RecordBatch]]:
    """The ranges of a task and their rows."""
    for part in task:
        yield part, read_range(part)


def read_range(part: InputRange) -> pa.RecordBatch:
    """The rows of one range, as they are, with `RAW_SCHEMA`. Row i has the id `NAME#i`, counted in its input.

    Raises:
        UserError: the input cannot be read, or changed since it was planned.
    """
    texts, problems = _READERS[part.kind](part)
    if len(texts) != part.n_rows:
        raise UserError(
            f"{part.path} changed while it was prepared: expected {part.n_rows} stories from number "
            f"{part.first_row} on, found {len(texts)}"
        )
    ids = [f"{part.source_name}#{part.first_row + row}" for row in range(part.n_rows)]
    return pa.RecordBatch.from_arrays([pa.array(ids, pa.string()), texts, problems], schema=RAW_SCHEMA)


def _first(files: Sequence[InputFile], max_stories: int | None) -> list[InputFile]:
    """Only the first stories of all files together; a validation split is left as it is."""
    left = max_stories
    taken = []
    for file in files:
        if left is not None and file.split is None:
            file = replace(file, n_rows=min(file.n_rows, left))
            left -= file.n_rows
        taken.append(file)
    return taken


def _renamed(validation: Sequence[InputFile], files: Sequence[InputFile]) -> list[InputFile]:
    """Keep story ids apart where a validation file is called like another input."""
    names = {file.name for file in files}
    return [replace(file, name=f"validation/{file.name}") if file.name in names else file for file in validation]


def _cut(file: InputFile, step: int, text_column: str, seed: int) -> list[InputRange]:
    borders = file.borders or (0,) * (file.n_rows // step + 2)
    return [
        InputRange(
            number=0,
            kind=file.kind,
            source_name=file.name,
            path=file.path,
            first_row=first,
            n_rows=min(step, file.n_rows - first),
            start_byte=borders[first // step],
            end_byte=borders[first // step + 1],
            separator=file.separator,
            text_column=text_column,
            seed=seed,
            split=file.split,
        )
        for first in range(0, file.n_rows, step)
    ]


def _describe(requested: str, found: Found, files: Sequence[InputFile]) -> dict[str, Any]:
    """What the manifest says; of files only names and digests, so it is equal wherever they lie."""
    listed = [{"name": file.name, "rows": file.n_rows, "sha256": file.sha256, "split": file.split} for file in files]
    is_path = found.used == "files"
    return {
        "requested": "files" if is_path else requested,
        "used": found.used,
        "why": found.why,
        "revision": found.revision,
        "digest": json_sha256(listed),
        "files": listed,
    }


_Texts = tuple[pa.Array, pa.Array]


def _read_parquet(part: InputRange) -> _Texts:
    column = hub.TEXT_COLUMN if part.kind == "hub" else part.text_column
    texts = formats.read_parquet(part.path, column, part.first_row, part.n_rows)
    problems = pa.array([None if valid else "not_text" for valid in texts.is_valid().to_pylist()], pa.string())
    return texts, problems


def _read_jsonl(part: InputRange) -> _Texts:
    rows = formats.read_jsonl(part.path, part.text_column, part.start_byte, part.end_byte)
    return _columns(rows[: part.n_rows])


def _read_text(part: InputRange) -> _Texts:
    return _columns(formats.read_text(part.path, part.separator, part.start_byte, part.end_byte, part.n_rows))


def _read_sample(part: InputRange) -> _Texts:
    from slm_ray.corpus import sample_stories

    stories = sample_stories(part.first_row, part.first_row + part.n_rows, part.seed)
    return _columns([(story.encode(), None) for story in stories])


def _columns(rows: Sequence[formats.Row]) -> _Texts:
    return (
        pa.array([text for text, _ in rows], pa.large_binary()),
        pa.array([problem for _, problem in rows], pa.string()),
    )


_READERS: dict[str, Callable[[InputRange], _Texts]] = {
    "parquet": _read_parquet,
    "hub": _read_parquet,
    "jsonl": _read_jsonl,
    "text": _read_text,
    "sample": _read_sample,
}
