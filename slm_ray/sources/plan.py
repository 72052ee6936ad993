"""What `--source` means, cut into fixed input ranges.

In: `auto`, `sample`, `hub:NAME`, or files, folders and globs here or in an object store. Out: a `SourcePlan`, whose
ranges are the work items of the pipeline (`reading` reads them). The first step of the flow. Ranges and story ids are
functions of the input alone, so every run has the same work items.
"""

import itertools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from slm_ray.errors import UserError
from slm_ray.sources import plain_text
from slm_ray.sources.discovery import Found, SourceResolver
from slm_ray.sources.formats import ScanOptions
from slm_ray.sources.input_files import InputRange, ScanResult
from slm_ray.sources.plain_text import SplitOptions
from slm_ray.storage import json_sha256

ROWS_PER_RANGE = 4000
"""Stories of one work item, fewer if they are long (`input_files.RANGE_BYTES`): 3 MB of TinyStories, so that two
workers share 20,000 stories evenly."""


@dataclass(frozen=True, kw_only=True)
class SourcePlan:
    """All work items of a job, and the manifest's account of the source."""

    ranges: tuple[InputRange, ...]
    source: dict[str, Any]  # requested, used, why, revision, digest, files

    @property
    def n_rows(self) -> int:
        """Stories that will be read."""
        return sum(part.n_rows for part in self.ranges)

    @property
    def tasks(self) -> tuple[tuple[InputRange, ...], ...]:
        """The ranges in order, those together that have to be read together: of one large row group of Parquet,
        or of one file that cannot be entered in the middle."""
        together = itertools.groupby(self.ranges, key=lambda part: (part.file, part.unit))
        return tuple(tuple(parts) for _, parts in together)

    @property
    def has_own_test(self) -> bool:
        """Whether the source brings a test split, so that none is taken from the rest."""
        return any(part.file.split == "test" for part in self.ranges)

    @property
    def has_own_validation(self) -> bool:
        """Whether the source brings a validation split, so that none is taken from the rest."""
        return any(part.file.split == "validation" for part in self.ranges)


def plan_source(
    source: str | Sequence[str],
    *,
    validation_source: str | Sequence[str] | None = None,
    max_stories: int | None = None,
    text_column: str = "text",
    cut_text: str = "auto",
    piece_chars: int = plain_text.PIECE_CHARS,
    seed: int = 0,
    rows_per_range: int = ROWS_PER_RANGE,
    download_folder: Path | None = None,
    on_bytes: Callable[[int], None] | None = None,
    on_paths: Callable[[list[str]], None] = lambda _paths: None,
) -> SourcePlan:
    """Find the inputs, read each file once, and cut them into ranges.

    `max_stories` takes the first stories of `source` (None: 20,000 of `auto`'s hub data set, 6,000 of the
    sample corpus, all of anything else). `cut_text`, one of `plain_text.CUTS`, says where a story of a text file ends;
    `piece_chars` is the usual length of its pieces. `download_folder` receives what the hub sends. `on_bytes` receives
    how many bytes were read since its last call, `on_paths` the files of a source before they are read.

    Raises:
        UserError: the source does not exist, is empty, or cannot be read; says which and what to do.
    """
    if max_stories is not None and max_stories < 1:
        raise UserError(f"max_stories ({max_stories}) must be at least 1")
    options = ScanOptions(
        text_column=text_column,
        step=rows_per_range,
        split_options=SplitOptions(mode=cut_text, piece_chars=piece_chars),
        on_bytes=on_bytes,
    )
    resolver = SourceResolver(options=options, seed=seed, folder=download_folder, on_paths=on_paths)
    found = resolver.find(_words(source), max_stories)
    files = _first(found.files, max_stories)
    own = None if validation_source is None else resolver.find_validation(_words(validation_source))
    if own is not None:
        files = [scanned for scanned in files if scanned.file.split != "validation"]
        files += _as_validation(own.files, {scanned.file.name for scanned in files})
    ranges = itertools.chain.from_iterable(map(_cut_into_ranges, files))
    numbered = tuple(replace(part, number=number) for number, part in enumerate(ranges))
    return SourcePlan(ranges=numbered, source=_describe(_words(source), found, own, files))


def _words(source: str | Sequence[str]) -> tuple[str, ...]:
    return (source,) if isinstance(source, str) else tuple(source)


def _first(files: Sequence[ScanResult], max_stories: int | None) -> list[ScanResult]:
    """The first stories of all files together; files that belong to a split stay as they are."""
    left = max_stories
    taken = []
    for scanned in files:
        if left is not None and scanned.file.split is None:
            scanned = replace(scanned, n_rows=min(scanned.n_rows, left))
            left -= scanned.n_rows
        taken.append(scanned)
    return taken


def _as_validation(files: Sequence[ScanResult], names: Collection[str]) -> list[ScanResult]:
    """Files of a validation source; one that is called like another input, of these `names`, gets a name of its own."""
    taken, renamed = set(names), []
    for scanned in files:
        name = scanned.file.name
        while name in taken:
            name = f"validation/{name}"
        taken.add(name)
        renamed.append(replace(scanned, file=replace(scanned.file, name=name, split="validation")))
    return renamed


def _cut_into_ranges(scanned: ScanResult) -> list[InputRange]:
    first_rows = [row for row in scanned.first_rows if row < scanned.n_rows]
    borders = scanned.borders or (0,) * (len(first_rows) + 1)
    units = scanned.units or (0,) * len(first_rows)
    return [
        InputRange(
            number=0,
            file=scanned.file,
            first_row=first,
            n_rows=end - first,
            start_byte=borders[number],
            end_byte=borders[number + 1],
            unit=units[number],
        )
        for number, (first, end) in enumerate(itertools.pairwise([*first_rows, scanned.n_rows]))
    ]


def _describe(
    words: Sequence[str], found: Found, validation: Found | None, files: Sequence[ScanResult]
) -> dict[str, Any]:
    """The manifest's account of the source: of files only names and digests, so it is equal wherever they lie."""
    listed = [_describe_file(file) for file in files]
    is_path = found.used == "files"
    own = {}
    if validation is not None and validation.revision is not None:
        own = {"validation": {"used": validation.used, "revision": validation.revision}}
    return {
        "requested": "files" if is_path else words[0],
        "used": found.used,
        "why": found.why,
        "revision": found.revision,
        **own,
        "digest": json_sha256(listed),
        "files": listed,
    }


def _describe_file(scanned: ScanResult) -> dict[str, Any]:
    file = scanned.file
    listed = {"name": file.name, "rows": scanned.n_rows, "sha256": scanned.sha256, "split": file.split}
    return {**listed, "cut": file.format.cut} if file.format.cut else listed
