"""What a worker holds of a corpus: `python tests/bench/training/corpus_memory.py [--tokens 4_150_000 475_000_000]`.

In: how many tokens. Writes stand-ins of random tokens with stories as long as TinyStories' (4.15 million tokens are 17
MB of text, 475 million the 1.9 GB of all of it), each in a folder that is removed afterwards, and lets a fresh process
open each and draw batches. Out: a line for each corpus and kind of sample: memory of the process's own before and
after, pages of the mapped file, and times.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from slm_ray.dataset import shards
from slm_ray.dataset.batches import TrainBatches
from slm_ray.dataset.manifest import FORMAT_VERSION, MANIFEST, Manifest, Split, load_manifest
from slm_ray.dataset.mapping.mapped import open_split

STORIES_A_SHARD = 100_000
VOCAB_SIZE = 4096
STEPS, BATCH_SIZE, CONTEXT = 300, 32, 256
BYTES_A_TOKEN = 4


def main() -> int:
    """Write each corpus, measure it in a process of its own, print a table."""
    parser = argparse.ArgumentParser(prog="bench/corpus_memory.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[4_150_000, 475_000_000], help="sizes of the corpora")
    parser.add_argument("--folder", default="", help="where to write them (default: the system's temporary folder)")
    parser.add_argument("--child", nargs=2, default=(), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(measured(*given.child)))
        return 0
    sizes = ["own before, MB", "after, MB", "most, MB", "mapped, MB"]
    titles = ["tokens", "stories", "samples", *sizes, "open, s", "batch, ms"]
    print(f"| {' | '.join(titles)} |\n{'|---' * len(titles)}|")
    for n_tokens in given.tokens:
        with tempfile.TemporaryDirectory(dir=given.folder or None) as folder:
            n_stories = write_corpus(Path(folder), n_tokens)
            for packing in ("making the file", "stories", "windows"):
                command = [sys.executable, __file__, "--child", folder, packing]
                found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                cells = [f"{n_tokens:,}", f"{n_stories:,}", packing, *found]
                print(f"| {' | '.join(cells)} |", flush=True)
    return 0


def write_corpus(folder: Path, n_tokens: int) -> int:
    """A data set of random tokens without a tokenizer. Returns its number of stories."""
    random, written, left, n_stories = np.random.default_rng(0), [], n_tokens, 0
    while left > 0:
        lengths = np.maximum(random.lognormal(5.2, 0.4, STORIES_A_SHARD).astype(np.int64), 8)
        lengths = lengths[: max(1, int(np.searchsorted(np.cumsum(lengths), left)))]
        path = folder / shards.shard_path("train", len(written))
        written.append(shards.write_shard(path, table(random, lengths, n_stories)))
        left -= int(lengths.sum())
        n_stories += len(lengths)
    nothing = Split.of(())
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        source={},
        parameters={},
        tokenizer={"vocab_size": VOCAB_SIZE, "sha256": ""},
        splits={"train": Split.of(tuple(written)), "validation": nothing, "test": nothing},
        rejected=nothing,
        counts={},
        fingerprint="",
    )
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return n_stories


def table(random: np.random.Generator, lengths: npt.NDArray[np.int64], first: int) -> pa.Table:
    """Stories of so many random tokens."""
    ends = np.concatenate([[0], np.cumsum(lengths)])
    tokens = random.integers(1, VOCAB_SIZE, int(ends[-1]), dtype=np.uint16)
    tokens[ends[1:] - 1] = 0
    schema = shards.shard_schema(VOCAB_SIZE)
    stories = pa.ListArray.from_arrays(pa.array(ends, pa.int32()), pa.array(tokens), type=schema.field("tokens").type)
    ids = pa.array([f"random#{number}" for number in range(first, first + len(lengths))])
    return pa.Table.from_arrays([ids, stories, pa.array(lengths * BYTES_A_TOKEN, pa.uint32())], schema=schema)


def measured(folder: str, packing: Any) -> list[str]:
    """What a worker sees: cells of the table."""
    manifest = load_manifest(folder)
    before, started = memory("RssAnon"), time.perf_counter()
    stream, note = open_split(folder, "train", manifest, 0)
    opened_s = time.perf_counter() - started
    if packing == "making the file":
        cells = [before, memory("RssAnon"), most_memory(), memory("RssFile"), opened_s]
        return [*(f"{cell:,.1f}" for cell in cells), note]
    batches = TrainBatches.of_stream(
        stream, seq_len=CONTEXT, batch_size=BATCH_SIZE, seed=0, rank=0, world_size=1, packing=packing
    )
    batches.at(0)
    started = time.perf_counter()
    for step in range(STEPS):
        batches.at(step * 7)
    batch_ms = (time.perf_counter() - started) / STEPS * 1e3
    cells = [before, memory("RssAnon"), most_memory(), memory("RssFile"), opened_s, batch_ms]
    return [f"{cell:,.1f}" for cell in cells]


def memory(name: str) -> float:
    """MB of this process by a line of Linux's /proc/self/status."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1024
    raise SystemExit("corpus_memory.py needs Linux's /proc")


def most_memory() -> float:
    """MB resident at most so far, mapped pages included."""
    return memory("VmHWM")


if __name__ == "__main__":
    raise SystemExit(main())
