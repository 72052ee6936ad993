"""The sample corpus as a source: stories made on the spot, the same for one seed everywhere.

In: a seed. Out: any range of its stories. Called by `discovery`; after that it is a file like any other.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from slm_ray.sources.compression import ScanWatch
from slm_ray.sources.input_files import InputFile, InputRange, ScanResult, Texts
from slm_ray.sources.rows import columns
from slm_ray.storage import json_sha256


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The first stories of the sample corpus."""

    seed: int
    n_stories: int
    cut = ""

    def scan(self, file: InputFile, step: int, watch: ScanWatch) -> ScanResult:  # noqa: ARG002 - there are no bytes
        """See `Format`. Any story can be made alone."""
        first_rows = tuple(range(0, self.n_stories, step))
        return ScanResult(
            file=file,
            sha256=sample_digest(self.seed),
            n_rows=self.n_stories,
            first_rows=first_rows,
            units=tuple(range(len(first_rows))),
        )

    def read(self, ranges: Sequence[InputRange]) -> Iterator[Texts]:
        """See `Format`."""
        from slm_ray.corpus.grammar import sample_stories

        for part in ranges:
            stories = sample_stories(part.rows.start, part.rows.stop, self.seed)
            yield columns([(story.encode(), None) for story in stories])


def sample_digest(seed: int) -> str:
    """Which sample corpus it is."""
    from slm_ray.corpus.grammar import SAMPLE_REVISION

    return json_sha256({"corpus": SAMPLE_REVISION, "seed": seed})
