"""Finding the inputs that a `--source` names, and reading each once to know its rows.

In: `auto`, `sample`, `hub:NAME`, or files, folders and globs. Out: `Found`, a `ScanResult` for each file. Called by
`plan`, which cuts them into ranges.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from slm_ray.errors import UserError
from slm_ray.hub_reference import PREFIX
from slm_ray.sources import addresses, formats, hub
from slm_ray.sources.compression import ScanWatch
from slm_ray.sources.input_files import InputFile, ScanResult
from slm_ray.sources.parquet import Parquet
from slm_ray.sources.sample import Sample
from slm_ray.storage import json_sha256

AUTO_DATASET = "roneneldan/TinyStories"
AUTO_STORIES = 20_000
SAMPLE_STORIES = 6_000
HUB_VALIDATION_SHARE = 0.05  # of --max-stories, taken from the hub's official validation split


@dataclass(frozen=True, kw_only=True)
class Found:
    """The inputs of a source, and which source it was."""

    files: list[ScanResult]
    used: str  # files, sample or hub:NAME
    revision: str | None = None  # of a hub data set or of the sample corpus
    why: str | None = None  # auto: why the hub was not used


@dataclass(frozen=True, kw_only=True)
class SourceResolver:
    """Finds what a source names, with one method for each kind of source."""

    options: formats.ScanOptions
    seed: int  # of the sample corpus
    folder: Path | None  # receives what the hub sends; None: in the cache of the hub's client
    on_paths: Callable[[list[str]], None] = lambda _paths: None  # receives the files before one of them is read

    def find(self, words: Sequence[str], max_stories: int | None) -> Found:
        """The inputs of a source. Raises UserError where it has none, or none with a story."""
        found = self._find(words, max_stories)
        if not sum(file.n_rows for file in found.files):
            raise UserError(f"no stories in {', '.join(words)}")
        return found

    def find_validation(self, words: Sequence[str]) -> Found:
        """The inputs of a validation source: of a hub data set its validation split, unless another one is named.

        Raises:
            UserError: as `find`, and for `auto`, which may be one source or the other.
        """
        if tuple(words) == ("auto",):
            raise UserError("auto cannot be the validation source: name files, sample or hub:OWNER/NAME")
        if len(words) == 1 and words[0].startswith(PREFIX) and hub.parse(words[0]).split is None:
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
                return self.from_hub(f"{PREFIX}{AUTO_DATASET}", max_stories or AUTO_STORIES)
            except UserError as error:
                why = str(error)
        return replace(self.from_sample(max_stories), why=why)

    def from_sample(self, max_stories: int | None) -> Found:
        """The sample corpus."""
        from slm_ray.corpus.grammar import SAMPLE_REVISION

        corpus = Sample(seed=self.seed, n_stories=max_stories or SAMPLE_STORIES)
        scanned = self._scan(InputFile(format=corpus, name="sample", path="sample"))
        return Found(files=[scanned], used="sample", revision=SAMPLE_REVISION)

    def from_hub(self, word: str, max_stories: int | None) -> Found:
        """Official splits of a hub data set: validation and test stay what they are, train is stories to split.

        A split that is named is all there is, and is stories to split.
        """
        named = hub.parse(word)
        download = hub.Download(
            name=named.name,
            wanted_revision=named.revision,
            text_column=self.options.text_column,
            folder=self.folder,
            on_bytes=self.options.on_bytes,
        )
        files = [self.scan_split(download, named.split or "train", max_stories)]
        if named.split is None:
            n_held_out = None if max_stories is None else max(1, round(max_stories * HUB_VALIDATION_SHARE))
            for split in ("validation", "test"):
                if split in download.splits:
                    files.append(self.scan_split(download, split, n_held_out, own_split=split))
        return Found(files=files, used=word, revision=download.revision)

    def scan_split(
        self, download: hub.Download, split: str, limit: int | None, own_split: str | None = None
    ) -> ScanResult:
        """One split of a hub data set, downloaded: its first `limit` stories or all."""
        path = str(download.fetch(split, limit))
        name = f"{download.name}/{split}"
        scanned = self._scan(InputFile(format=Parquet(hub.TEXT_COLUMN), name=name, path=path, split=own_split))
        digest = json_sha256([name, download.revision, self.options.text_column, scanned.n_rows])
        return replace(scanned, sha256=digest)

    def from_paths(self, words: Sequence[str]) -> Found:
        """Files, folders and globs, here or in an object store."""
        paths = addresses.expand(words, formats.is_known, formats.KNOWN_ENDS, formats.may_be_other)
        self.on_paths(paths)
        files = [self.scan_file(path, name) for path, name in zip(paths, addresses.names(paths), strict=True)]
        return Found(files=files, used="files")

    def scan_file(self, path: str, name: str) -> ScanResult:
        """One file, read once."""
        file_format, compression = formats.format_of(path, self.options)
        with addresses.reading(path):
            stamp = addresses.stamp(path)
        file = InputFile(format=file_format, name=name, path=path, compression=compression, stamp=stamp)
        return self._scan(file, self.options.on_bytes)

    def _scan(self, file: InputFile, on_bytes: Callable[[int], None] | None = None) -> ScanResult:
        with addresses.reading(file.path):
            return file.format.scan(file, self.options.step, ScanWatch(on_bytes))


def is_special(word: str) -> bool:
    """Whether a word of a source is no file, folder or glob."""
    return word in ("auto", "sample") or word.startswith(PREFIX)
