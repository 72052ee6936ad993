"""The stories of a step are exactly those whose tokens the loader gives for it."""

import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slm_ray.dataset import shards
from slm_ray.dataset.batches import TrainBatches
from slm_ray.dataset.manifest import Split
from slm_ray.dataset.samples import SampleOrder
from slm_ray.dataset.shards import read_split
from slm_ray.dataset.stream import TokenStream
from slm_ray.dataset.windows import StoryPart, story_parts
from slm_ray.errors import UserError

END = 0


def write_stories(folder: Path, lengths: list[list[int]]) -> Any:
    """Shards of stories of so many tokens, in which a token and its neighbours tell where they are. A manifest."""
    written, token = [], 0
    for number, stories in enumerate(lengths):
        rows = []
        for length in stories:
            rows.append([*range(token + 1, token + length), END])
            token += length
        columns = [
            pa.array([f"{number}#{row}" for row in range(len(rows))]),
            pa.array(rows, pa.list_(pa.uint16())),
            pa.array([1] * len(rows), pa.uint32()),
        ]
        table = pa.Table.from_arrays(columns, names=["story_id", "tokens", "n_bytes"])
        path = folder / shards.shard_path("train", number)
        written.append(shards.write_shard(path, table.cast(shards.shard_schema(2**16))))
    return SimpleNamespace(splits={"train": Split.of(tuple(written))}, tokenizer={"vocab_size": 2**16})


def loaded(folder: Path, manifest: Any, *, seq_len: int, batch_size: int, seed: int, workers: int) -> list[Any]:
    """What every rank's loader gives."""
    stream = TokenStream.of_split(*read_split(folder, "train", manifest=manifest), END)
    shape = {"seq_len": seq_len, "batch_size": batch_size, "seed": seed, "world_size": workers}
    return [TrainBatches.of_stream(stream, rank=rank, **shape) for rank in range(workers)]


@settings(max_examples=60)
@given(
    lengths=st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=6), min_size=1, max_size=4),
    seq_len=st.integers(1, 9),
    share=st.integers(1, 4),
    workers=st.integers(1, 3),
    seed=st.integers(0, 2**40),
    step=st.integers(0, 60),  # few windows and 60 steps: many epochs
)
def test_the_parts_of_a_step_are_the_tokens_that_its_ranks_are_given(
    lengths: list[list[int]], seq_len: int, share: int, workers: int, seed: int, step: int
) -> None:
    folder = Path(tempfile.mkdtemp())
    try:
        manifest = write_stories(folder, lengths)
        n_tokens = manifest.splits["train"].tokens
        seq_len = min(seq_len, n_tokens)
        ranks = loaded(folder, manifest, seq_len=seq_len, batch_size=share * workers, seed=seed, workers=workers)
        order = SampleOrder(n_samples=n_tokens // seq_len, batch_size=share * workers, seed=seed)
        found = story_parts(folder, manifest, order.samples(step).tolist(), seq_len)
    finally:
        shutil.rmtree(folder)
    inputs = np.concatenate([rank.at(step).inputs for rank in ranks])
    targets = np.concatenate([rank.at(step).targets for rank in ranks])
    for own_inputs, own_targets, parts in zip(inputs, targets, found, strict=True):
        given_tokens = [*own_inputs.tolist(), int(own_targets[-1])]
        named = [token for part in parts for token in part.ids]
        assert given_tokens == ([END] if len(named) == seq_len else []) + named
        predicted = [token for part in parts for token in part.ids[part.first_target - part.start :]]
        assert own_targets.tolist() == predicted
        for part in parts:
            shard, row = map(int, part.story_id.split("#"))
            before = sum(map(sum, lengths[:shard])) + sum(lengths[shard][:row])
            whole = [*range(before + 1, before + lengths[shard][row]), END]
            assert (part.shard.file, part.row, part.n_tokens) == (f"train/{shard:05d}.parquet", row, len(whole))
            assert list(part.ids) == whole[part.start : part.stop] != []


def parts(folder: Path, manifest: Any, window: int) -> list[tuple[str, int, int, int]]:
    (found,) = story_parts(folder, manifest, [window], 4)
    return [(part.story_id, part.start, part.first_target, part.stop) for part in found]


def test_a_token_that_is_only_read_is_told_from_those_to_predict(tmp_path: Path) -> None:
    manifest = write_stories(tmp_path, [[3], [4, 8]])
    assert parts(tmp_path, manifest, 0) == [("0#0", 0, 0, 3), ("1#0", 0, 0, 1)]
    assert parts(tmp_path, manifest, 1) == [("1#0", 0, 1, 4), ("1#1", 0, 0, 1)]
    assert parts(tmp_path, manifest, 2) == [("1#1", 0, 1, 5)]
    manifest = write_stories(tmp_path / "even", [[4], [4]])
    assert parts(tmp_path / "even", manifest, 1) == [("0#0", 3, 4, 4), ("1#0", 0, 0, 4)]


def test_shards_that_the_windows_do_not_touch_are_not_needed(tmp_path: Path) -> None:
    manifest = write_stories(tmp_path, [[8], [8], [8]])
    (tmp_path / "train/00001.parquet").unlink()
    assert parts(tmp_path, manifest, 5) == [("2#0", 3, 4, 8)]
    with pytest.raises(UserError, match=r"cannot read .*00001.parquet"):
        story_parts(tmp_path, manifest, [5, 2], 4)


def test_a_shard_that_is_not_as_it_is_counted_is_refused(tmp_path: Path) -> None:
    manifest = write_stories(tmp_path, [[8]])
    shard = manifest.splits["train"].shards[0]
    counted = SimpleNamespace(**{**vars(shard), "tokens": 9})
    manifest.splits["train"] = SimpleNamespace(shards=(counted,))
    with pytest.raises(UserError, match=r"has 8 tokens, but manifest\.json lists 9"):
        story_parts(tmp_path, manifest, [0], 4)


def test_a_part_knows_its_end() -> None:
    part = StoryPart(story_id="a#0", shard=None, row=0, n_tokens=9, start=2, first_target=3, ids=(5, 6))  # type: ignore[arg-type]
    assert part.stop == 4
