"""From a story's id back to its source.

In: a manifest and an id such as `train.parquet#17`. Out: the source file and the row, and which range of the
preparation read it, after which its shard is named.
"""

import difflib
import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from slm_ray.dataset.manifest import Manifest
from slm_ray.errors import UserError, visible

_ROW = re.compile("0|[1-9][0-9]{0,17}")


@dataclass(frozen=True, kw_only=True)
class SourceRow:
    """Where a story was read."""

    file: str
    """Name of the source file, as ids begin with it."""
    row: int
    """In the file, from 0."""
    rows: int
    """Of the file, as many as were read."""
    sha256: str
    """Of the whole file."""


def source_row(manifest: Manifest, story_id: str) -> SourceRow:
    """The source file and the row that an id names.

    Raises:
        UserError: the manifest lists no such file, or it has no such row; says what there is.
    """
    files = {file["name"]: file for file in manifest.source.get("files", ())}
    name, _, digits = story_id.rpartition("#")
    if name not in files or not _ROW.fullmatch(digits):
        raise UserError(_unknown(story_id, name, files))
    file, row = files[name], int(digits)
    if not file["rows"]:
        raise UserError(f"no story {visible(story_id)}: {visible(name)} has no rows")
    if row >= file["rows"]:
        last = f"{visible(name)}#{file['rows'] - 1}"
        raise UserError(f"no story {visible(story_id)}: {visible(name)} has {file['rows']:,} rows, up to {last}")
    return SourceRow(file=name, row=row, rows=file["rows"], sha256=file["sha256"])


def range_number(manifest: Manifest, source: SourceRow) -> int | None:
    """Which range of the preparation read a row: its number names the shards. None where the manifest does not tell.

    Ranges are numbered in the order of files and rows and have different lengths: they end with so many rows or so
    many bytes. Each row went to one of the shards that have the range's number, kept or rejected.
    """
    before = 0
    for file in manifest.source["files"]:
        if file["name"] == source.file:
            break
        before += file["rows"]
    rows: dict[int, int] = {}
    for split in (*manifest.splits.values(), manifest.rejected):
        for shard in split.shards:
            stem = PurePosixPath(shard.file).stem
            number = int(stem) if stem.isdecimal() else -1
            rows[number] = rows.get(number, 0) + shard.rows
    if -1 in rows or sum(rows.values()) != sum(file["rows"] for file in manifest.source["files"]):
        return None
    numbers = sorted(rows)
    ends = itertools.accumulate(rows[number] for number in numbers)
    return next(number for number, end in zip(numbers, ends, strict=True) if before + source.row < end)


def _unknown(story_id: str, name: str, files: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name or story_id, files, n=1, cutoff=0.0)
    example = f"{near[0]}#0" if near else "train.parquet#0"
    more = f" and {len(files) - 4:,} more" if len(files) > 4 else ""
    names = f"; the files are {visible(', '.join(list(files)[:4]))}{more}" if near else ""
    return (
        f"no story {visible(story_id)}: an id is the name of a source file, # and a row counted from 0, "
        f"as {visible(example)}{names}"
    )
