"""Small data sets of sample stories, made without Beam."""

from collections.abc import Callable, Iterable
from pathlib import Path

import pyarrow as pa

from slm_ray.corpus.grammar import sample_stories
from slm_ray.dataset import shards
from slm_ray.dataset.manifest import FORMAT_VERSION, MANIFEST, SPLITS, TOKENIZER, Manifest, Split, fingerprint
from slm_ray.tokenization.tokenizer import Tokenizer

SAMPLE_ROWS = 1_000_000
"""More than any test takes."""


def write_data(
    folder: Path,
    tokenizer: Tokenizer,
    ranges: dict[str, list[tuple[int, int]]],
    stories: Callable[[int, int], Iterable[str]] = sample_stories,
) -> None:
    """Write sample stories, given by split and shard as (start, stop), as a data set."""
    splits = {}
    for split in SPLITS:
        written = []
        for number, (start, stop) in enumerate(ranges.get(split, [])):
            path = folder / shards.shard_path(split, number)
            written.append(shards.write_shard(path, _table(tokenizer, start, list(stories(start, stop)))))
        splits[split] = Split.of(tuple(written))
    tokenizer.save(folder / TOKENIZER)
    mark = fingerprint(source_digest="test", parameters={}, tokenizer_sha256=tokenizer.sha256, splits=splits)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        source={"digest": "test", "files": [{"name": "sample", "rows": SAMPLE_ROWS, "sha256": "test", "split": None}]},
        parameters={},
        tokenizer={"vocab_size": tokenizer.vocab_size, "sha256": tokenizer.sha256},
        splits=splits,
        rejected=Split.of(()),
        counts={},
        fingerprint=mark,
    )
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")


def _table(tokenizer: Tokenizer, start: int, stories: list[str]) -> pa.Table:
    columns = [
        pa.array([f"sample#{number}" for number in range(start, start + len(stories))]),
        pa.array([[*tokenizer.encode(story), tokenizer.eos_id] for story in stories], pa.list_(pa.uint16())),
        pa.array([len(story.encode()) for story in stories], pa.uint32()),
    ]
    return pa.Table.from_arrays(columns, names=["story_id", "tokens", "n_bytes"]).cast(
        shards.shard_schema(tokenizer.vocab_size)
    )
