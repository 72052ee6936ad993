"""Which stories are equal to an earlier one, found by their hashes.

In: hashes and positions of kept rows. Out: the rows to leave out, by range. Of equal stories the one with the lowest
position stays, so the result depends on the input alone.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from slm_ray.preparation.splits import HASH_BYTES, hash_bytes
from slm_ray.sources.input_files import InputRange
from slm_ray.sources.reading import Item

Positions = npt.NDArray[np.uint64]
"""Where stories stand, as one number each: see `row_positions`."""
HASH_BUCKETS = 16  # the hashes of a data set are compared in this many independent parts
_ROW_BITS = 32
_MAIN_SOURCE = np.uint64(1 << 62)


def row_positions(part: InputRange, rows: npt.NDArray[np.intp]) -> Positions:
    """Rows as numbers; of two equal stories the one with the lower number is kept.

    Validation rows of their own source come before all others, so a copy in the training source is the one
    that goes; then the lower range, then the lower row.
    """
    base = np.uint64(part.number << _ROW_BITS)
    if part.file.split is None:
        base |= _MAIN_SOURCE
    return rows.astype(np.uint64) | base


def rows_by_range(positions: Positions) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
    """`(range number, rows)`, both in order, of some `row_positions`."""
    positions = np.sort(positions)
    numbers = (positions & ~_MAIN_SOURCE) >> np.uint64(_ROW_BITS)
    rows = (positions & np.uint64(2**_ROW_BITS - 1)).astype(np.int64)
    for number in np.unique(numbers):
        yield int(number), rows[numbers == number]


def hash_rows(item: Item) -> Iterator[tuple[int, tuple[bytes, bytes]]]:
    """`(bucket, (hashes, positions))` of the kept rows: all that has to be shuffled to find duplicates.

    As plain bytes, which a runner sends as they are: arrays would be pickled, each by itself.
    """
    part, batch = item
    rows = np.flatnonzero(batch["reason"].is_null().to_numpy(zero_copy_only=False))
    hashes = hash_bytes(batch["hash"])[rows]
    positions = row_positions(part, rows)
    buckets = hashes[:, 0] % HASH_BUCKETS
    for bucket in np.unique(buckets):
        inside = np.flatnonzero(buckets == bucket)
        yield int(bucket), (hashes[inside].tobytes(), positions[inside].tobytes())


def find_duplicates(
    group: tuple[int, Iterable[tuple[bytes, bytes]]],
) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
    """`(range number, rows)` of all stories of one bucket that equal another one with a lower position."""
    hashes, places = (b"".join(column) for column in zip(*group[1], strict=True))
    positions = np.frombuffer(places, np.uint64)
    of_bytes = pa.binary(HASH_BYTES)
    named = pa.FixedSizeBinaryArray.from_buffers(of_bytes, len(positions), [None, pa.py_buffer(hashes)])
    table = pa.table({"hash": named, "position": positions})
    lowest = table.group_by("hash").aggregate([("position", "min")])["position_min"]
    yield from rows_by_range(np.setdiff1d(table["position"].to_numpy(), lowest.to_numpy()))
