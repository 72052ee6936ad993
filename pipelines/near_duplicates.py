"""The step that finds stories nearly equal to others: a thin wire around `slm_ray.preparation.near_duplicates`.

In: cleaned rows, `(InputRange, RecordBatch)` as between all steps. Out: which rows of which range to leave out. An
option; stands beside `FindDuplicates` of `pipelines/transforms.py` and gives what that gives.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import apache_beam as beam
from apache_beam.pvalue import PCollection

from slm_ray.preparation import near_duplicates


@dataclass
class FindNearDuplicates(beam.PTransform):
    """Cleaned rows to `(range number, arrays of rows)` to leave out. Only signatures and positions are shuffled.

    Rows with a reason take no part. All signatures meet under one key, 136 bytes a story: see `near_duplicates`.
    """

    threshold: float  # similarity, 0.1 to 1

    def __post_init__(self) -> None:
        super().__init__()

    def expand(self, pcoll: PCollection) -> PCollection:
        find = partial(near_duplicates.find_near_duplicates, threshold=self.threshold)
        return (
            pcoll
            | "Sign" >> beam.FlatMap(near_duplicates.sign_rows).with_output_types(tuple[int, Any])
            | "Together" >> beam.GroupByKey()
            | "NotLowest" >> beam.FlatMap(find).with_output_types(tuple[int, Any])
            | "ByRange" >> beam.GroupByKey()
        )
