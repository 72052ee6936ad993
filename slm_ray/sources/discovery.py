"""Finding the inputs that a `--source` names, and reading each once to know its rows.

In: `auto`, `sample`, `hub:NAME`, or files, folders and globs. Out: `Found`, the list of `InputFile`. Called by
`sources`, which cuts them into ranges.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from slm_ray.errors import UserError
from slm_ray.sources import addresses, formats, hub
from slm_ray.storage import json_sha256

AUTO_DATASET = "roneneldan/TinyStories"
AUTO_STORIES = 20_000
SAMPLE_STORIES = 6_000
HUB_VALIDATION_SHARE = 0.05  # of --max-stories, taken from the hub's official validation split


@dataclass(frozen=True, kw_only=True)
class InputFile:
    """One input with its rows counted; `step` rows lie between two `borders`."""

    kind: str  # one of formats.KINDS, hub (Parquet from there) or sample
    name: str  # first part of the story ids; no absolute path
    path: str  # or address
    sha256: str  # of what determines the rows
    n_rows: int
    stamp: str = ""  # of addresses.stamp, before it was scanned; not in the manifest, as it depends on the place
    borders: tuple[int, ...] = ()
    units: tuple[int, ...] = ()
    separator: str = ""
    compression: str = ""
    cut: str = ""  # text: what besides the content determines the rows
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
    """How inputs are looked for; `find` is one method per kind of source."""

    scanning: formats.Scanning
    seed: int  # of the sample corpus
    folder: Path | None  # receives what the hub sends; None: in the cache of the hub's client
    on_paths: Callable[[list[str]], None] = lambda _paths: None  # hears of files before one of them is read

    def find(self, words: Sequence[str], max_stories: int | None) -> Found:
        """The inputs of a source. Raises UserError where it has none, or none with a story."""
        found = self._find(words, max_stories)
        if not sum(file.n_rows for file in found.files):
            raise UserError(f"no stories in {', '.join(words)}")
        return found

    def find_validation(self, words: Sequence[str]) -> Found:
        """The inputs of a validation source: of a hub data set its validation split, unless another one is named.

        Raises:
            UserError: as `find`, and for `auto`, which may turn out to be this or that.
        """
        if tuple(words) == ("auto",):
            raise UserError("auto cannot be the validation source: name files, sample or hub:OWNER/NAME")
        if len(words) == 1 and words[0].startswith(hub.PREFIX) and hub.parse(words[0]).split is None:
            words = (f"{words[0]}:validation",)
        return self.find(words, None)

    def _find(self, words: Sequence[str], max_stories: int | None) -> Found:
        special = [word for word in words if is_special(word)]
        if special and len(words) > 1:
            raise UserError(f"{special[0]} is a source by itself: name it alone, or files, folders and globs only")
        if not special:
            return self.from_paths(words)
        if words[0] == "auto":
            return self.from_hub_or_sample(max_stories)
        return self.from_sample(max_stories) if words[0] == "sample" else self.from_hub(words[0], max_stories)

    def from_hub_or_sample(self, max_stories: int | None) -> Found:
        """TinyStories from the hub, or the sample corpus and why."""
        why = hub.unreachable(AUTO_DATASET)
        if why is None:
            try:
                return self.from_hub(f"{hub.PREFIX}{AUTO_DATASET}", max_stories or AUTO_STORIES)
            except UserError as error:
                why = str(error)
        return replace(self.from_sample(max_stories), why=why)

    def from_sample(self, max_stories: int | None) -> Found:
        from slm_ray.corpus.grammar import SAMPLE_REVISION

        digest = sample_digest(self.seed)
        n_rows = max_stories or SAMPLE_STORIES
        units = tuple(range(-(-n_rows // self.scanning.step)))
        file = InputFile(kind="sample", name="sample", path="sample", sha256=digest, n_rows=n_rows, units=units)
        return Found(files=[file], used="sample", revision=SAMPLE_REVISION)

    def from_hub(self, word: str, max_stories: int | None) -> Found:
        """Official splits of a hub data set: validation and test stay what they are, train is stories to split.

        A split that is named is all there is, and is stories to split.
        """
        named = hub.parse(word)
        download = hub.Download(
            name=named.name,
            wanted_revision=named.revision,
            text_column=self.scanning.text_column,
            folder=self.folder,
            on_bytes=self.scanning.on_bytes,
        )
        files = [self.downloaded(download, named.split or "train", max_stories)]
        if named.split is None:
            n_held_out = None if max_stories is None else max(1, round(max_stories * HUB_VALIDATION_SHARE))
            for split in ("validation", "test"):
                if split in download.splits:
                    files.append(replace(self.downloaded(download, split, n_held_out), split=split))
        return Found(files=files, used=word, revision=download.revision)

    def downloaded(self, download: hub.Download, split: str, limit: int | None) -> InputFile:
        """One split of a hub data set as a file, its first `limit` stories or all."""
        path = str(download.fetch(split, limit))
        scanned = formats.scan(path, replace(self.scanning, text_column=hub.TEXT_COLUMN, on_bytes=None))
        name = f"{download.name}/{split}"
        digest = json_sha256([name, download.revision, self.scanning.text_column, scanned.n_rows])
        return InputFile(kind="hub", name=name, path=path, sha256=digest, n_rows=scanned.n_rows, units=scanned.units)

    def from_paths(self, words: Sequence[str]) -> Found:
        """Files, folders and globs, here or in an object store."""
        paths = addresses.expand(words, formats.is_known, formats.KNOWN_ENDS)
        self.on_paths(paths)
        files = [self.file(path, name) for path, name in zip(paths, addresses.names(paths), strict=True)]
        return Found(files=files, used="files")

    def file(self, path: str, name: str) -> InputFile:
        """One file, read once."""
        kind, compression = formats.kind_of(path) or ("", "")
        with addresses.reading(path):
            stamp = addresses.stamp(path)
        scanned = formats.scan(path, self.scanning)
        piece_chars = f" of {self.scanning.cut.piece_chars} characters" if scanned.separator == "pieces" else ""
        return InputFile(
            kind=kind,
            name=name,
            path=path,
            sha256=scanned.sha256,
            n_rows=scanned.n_rows,
            stamp=stamp,
            borders=scanned.borders,
            units=scanned.units,
            separator=scanned.separator,
            compression=compression,
            cut=f"{scanned.separator}{piece_chars}",
        )


def sample_digest(seed: int) -> str:
    """Which sample corpus it is."""
    from slm_ray.corpus.grammar import SAMPLE_REVISION

    return json_sha256({"corpus": SAMPLE_REVISION, "seed": seed})


def is_special(word: str) -> bool:
    """Whether a word of a source is no file, folder or glob."""
    return word in ("auto", "sample") or word.startswith(hub.PREFIX)
