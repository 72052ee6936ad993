"""Finding the inputs that a `--source` names, and reading each once to know its rows.

In: `auto`, `sample`, `hub:NAME`, or a file, folder or glob. Out: `Found`, the list of `InputFile`. Called by `sources`,
which cuts them into ranges.
"""

import glob
import os
from dataclasses import dataclass, replace
from pathlib import Path

from slm_ray import formats, hub
from slm_ray.errors import UserError
from slm_ray.shards import json_sha256

AUTO_DATASET = "roneneldan/TinyStories"
AUTO_STORIES = 20_000
SAMPLE_STORIES = 6_000
HUB_VALIDATION_SHARE = 0.05  # of --max-stories, taken from the hub's official validation split


@dataclass(frozen=True, kw_only=True)
class InputFile:
    """One input with its rows counted; `step` rows lie between two `borders`."""

    kind: str  # parquet, hub (Parquet from there), jsonl, text or sample
    name: str  # first part of the story ids; no absolute path
    path: str
    sha256: str  # of what determines the rows
    n_rows: int
    borders: tuple[int, ...] = ()
    separator: str = ""
    split: str | None = None  # all rows belong to this split; None: by hash of the text


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a source turned out to be."""

    files: list[InputFile]
    used: str
    revision: str | None = None
    why: str | None = None


@dataclass(frozen=True, kw_only=True)
class Scanner:
    """How inputs are looked at; `find` is one method per kind of source."""

    text_column: str
    step: int
    seed: int
    folder: Path | None

    def find(self, source: str, max_stories: int | None) -> Found:
        """The inputs of a source. Raises UserError where it has none, or none with a story."""
        found = self._find(source, max_stories)
        if not sum(file.n_rows for file in found.files):
            raise UserError(f"no stories in {source}")
        return found

    def _find(self, source: str, max_stories: int | None) -> Found:
        if source == "auto":
            return self.from_hub_or_sample(max_stories)
        if source == "sample":
            return self.from_sample(max_stories)
        if source.startswith("hub:"):
            return self.from_hub(source.removeprefix("hub:"), max_stories)
        return self.from_paths(source)

    def from_hub_or_sample(self, max_stories: int | None) -> Found:
        """TinyStories from the hub, or the sample corpus and why."""
        why = hub.unreachable(AUTO_DATASET)
        if why is None:
            try:
                return self.from_hub(AUTO_DATASET, max_stories or AUTO_STORIES)
            except UserError as error:
                why = str(error)
        return replace(self.from_sample(max_stories), why=why)

    def from_sample(self, max_stories: int | None) -> Found:
        from slm_ray.corpus import SAMPLE_REVISION

        digest = json_sha256({"corpus": SAMPLE_REVISION, "seed": self.seed})
        n_rows = max_stories or SAMPLE_STORIES
        file = InputFile(kind="sample", name="sample", path="sample", sha256=digest, n_rows=n_rows)
        return Found(files=[file], used="sample", revision=SAMPLE_REVISION)

    def from_hub(self, name: str, max_stories: int | None) -> Found:
        """Official splits of a hub data set: validation stays validation, all others are stories to split."""
        n_validation = None if max_stories is None else max(1, round(max_stories * HUB_VALIDATION_SHARE))
        download = hub.Download(name=name, text_column=self.text_column, folder=self.folder)
        files = [self.downloaded(download, "train", max_stories)]
        if "validation" in download.splits:
            files.append(replace(self.downloaded(download, "validation", n_validation), split="validation"))
        return Found(files=files, used=f"hub:{name}", revision=download.revision)

    def downloaded(self, download: hub.Download, split: str, limit: int | None) -> InputFile:
        path = download.fetch(split, limit)
        scanned = formats.scan(path, hub.TEXT_COLUMN, self.step)
        name = f"{download.name}/{split}"
        digest = json_sha256([name, download.revision, self.text_column, scanned.n_rows])
        return InputFile(kind="hub", name=name, path=str(path), sha256=digest, n_rows=scanned.n_rows)

    def from_paths(self, source: str) -> Found:
        paths = _expand(source)
        common = Path(os.path.commonpath([path.parent for path in paths]))
        return Found(files=[self.file(path, common) for path in paths], used="files")

    def file(self, path: Path, common: Path) -> InputFile:
        scanned = formats.scan(path, self.text_column, self.step)
        return InputFile(
            kind=formats.KINDS[path.suffix.lower()],
            name=path.relative_to(common).as_posix(),
            path=str(path),
            sha256=scanned.sha256,
            n_rows=scanned.n_rows,
            borders=scanned.borders,
            separator=scanned.separator,
        )


def _expand(source: str) -> list[Path]:
    """The files that a path or glob stands for, sorted; a folder means all files of known kinds below it."""
    path = Path(source).expanduser()
    if path.is_dir():
        inside = (file for file in path.rglob("*") if file.is_file() and not _is_hidden(file, path))
        found = [file for file in inside if file.suffix.lower() in formats.KINDS]
        missing = f"no {_known_kinds()} files in the folder {source}"
    elif path.is_file():
        found, missing = [path], ""
    else:
        names = glob.glob(str(path), recursive=True)  # noqa: PTH207 - Path.glob takes no absolute pattern
        found = [Path(name) for name in names if Path(name).is_file()]
        missing = f"no such file, folder or glob: {source} (or use auto, sample, hub:NAME)"
    if not found:
        raise UserError(missing)
    for file in found:
        if file.suffix.lower() not in formats.KINDS:
            raise UserError(f"{file}: expected a file that ends in {_known_kinds()}")
    # Not resolved: a link keeps its name, which says what it is (the hub's cache links to files without one).
    return sorted({Path(os.path.abspath(file)) for file in found})  # noqa: PTH100 - absolute() keeps ".."


def _is_hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def _known_kinds() -> str:
    return ", ".join(formats.KINDS)
