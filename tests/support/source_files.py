"""Stories, and the files that hold them."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from slm_ray.sources import plan
from slm_ray.sources.input_files import InputRange
from slm_ray.sources.reading import read_ranges

STORIES = [f"Story number {number}, with\n\na blank line." for number in range(10)]


def write_parquet(path: Path, texts: list[str | None], row_group_size: int = 3) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"n": range(len(texts)), "text": texts}), path, row_group_size=row_group_size)
    return path


def write_jsonl(path: Path, lines: list[bytes]) -> Path:
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def read_range(part: InputRange) -> pa.RecordBatch:
    """The rows of one range alone."""
    [(_, batch)] = read_ranges((part,))
    return batch


def set_rows_per_range(patch: pytest.MonkeyPatch, rows: int) -> None:
    """Let `plan_source` cut short ranges, so that a small input has several."""
    original = plan.plan_source
    patch.setattr(plan, "plan_source", lambda *args, **options: original(*args, **{**options, "rows_per_range": rows}))
