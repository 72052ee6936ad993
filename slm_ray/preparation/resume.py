"""The ranges that an interrupted job completed, so that the same job does not repeat them.

In: a staging folder and a plan. Out: the ranges that are left to read and to write. Called by `pipelines/prepare.py`
when it begins. A range counts as completed by its files, which appear whole or not at all.
"""

from dataclasses import dataclass

from slm_ray import storage
from slm_ray.dataset import shards
from slm_ray.errors import UserError
from slm_ray.preparation.cleaned_files import CLEANED
from slm_ray.preparation.summary import RangeSummary
from slm_ray.preparation.summary_files import load_summaries
from slm_ray.sources.input_files import InputRange
from slm_ray.sources.plan import SourcePlan
from slm_ray.storage import StoragePath


@dataclass(frozen=True)
class Completed:
    """Ranges that an interrupted run of the same job completed, by number."""

    cleaned: frozenset[int]
    written: frozenset[int]  # their shards are whole

    @classmethod
    def of(cls, staged: StoragePath) -> "Completed":
        """The completed ranges of a staging folder."""
        cleaned = storage.files_below(staged / CLEANED)
        return cls(
            cleaned=frozenset(int(path.stem) for path in cleaned if path.suffix == ".arrow"),
            written=frozenset(found.number for found in load_summaries(staged) if _is_whole(staged, found)),
        )

    def left_to_read(self, plan: SourcePlan) -> list[tuple[InputRange, ...]]:
        """The tasks of a plan without the ranges that are cleaned already."""
        tasks = (tuple(part for part in task if part.number not in self.cleaned) for task in plan.tasks)
        return [task for task in tasks if task]


def is_left(part: InputRange, written: frozenset[int]) -> bool:
    """Whether the shards of a range are still to be written."""
    return part.number not in written


def _is_whole(staged: StoragePath, found: RangeSummary) -> bool:
    """Whether the shards of a completed range are as they were written: a power cut may have torn them."""
    try:
        for shard in found.shards.values():
            shards.checked_content(staged / shard.file, shard.sha256)
    except shards.UnreadableError:
        raise
    except UserError:
        return False
    return True
