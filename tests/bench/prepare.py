"""Data preparation against a named peer, in one run: `python tests/bench/prepare.py`.

The whole job (read, clean, split, tokenize, write) in MB/s of text, with one given tokenizer, on this machine's cores:
(ours) `pipelines/prepare.py` with two worker processes, (peer) `datasets.map(batched=True, num_proc=2)` that only
tokenizes and writes Parquet. Fresh processes, in turn; the ratio is taken pair by pair. The input is repeated with a
different last sentence in each copy, for equal stories would be dropped as duplicates.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WORKERS = 2
STORIES_PER_FILE = 40_000


def main() -> int:
    """Make the input, run both sides in turn, print a table."""
    parser = argparse.ArgumentParser(prog="bench/prepare.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--source", help="Parquet file with a text column (default: the sample corpus)")
    parser.add_argument("--megabytes", type=float, default=80.0, help="size of the input, MB of text (default: 80)")
    parser.add_argument("--rounds", type=int, default=3, help="pairs of runs (default: 3)")
    parser.add_argument("--peer", nargs=3, metavar=("INPUT", "TOKENIZER", "OUTPUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:
        run_peer(*options.peer)
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        n_bytes = write_input(folder / "input", options.source, options.megabytes)
        tokenizer = write_tokenizer(folder / "input", folder / "tokenizer.json")
        print(f"input: {n_bytes / 1e6:.1f} MB of text; {os.cpu_count()} cores; {WORKERS} processes on both sides")
        speeds = [measure(folder, tokenizer, n_bytes, number) for number in range(options.rounds)]
    ratios = [ours / peer for ours, peer in speeds]
    print(json.dumps({
        "ours_mb_per_s": round(statistics.median(ours for ours, _ in speeds), 2),
        "datasets_map_mb_per_s": round(statistics.median(peer for _, peer in speeds), 2),
        "ratio": round(statistics.median(ratios), 2), "ratios": [round(ratio, 2) for ratio in ratios],
    }))  # fmt: skip
    return 0


def write_input(folder: Path, source: str | None, megabytes: float) -> int:
    """Stories repeated to the wanted size, every copy with an ending of its own. Returns bytes of text."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir()
    wanted, written, batch, number = int(megabytes * 1e6), 0, [], 0
    for story in _endless(source):
        batch.append(story)
        written += len(story.encode())
        if len(batch) == STORIES_PER_FILE or written >= wanted:
            pq.write_table(pa.table({"text": batch}), folder / f"{number:03d}.parquet", compression="zstd")
            batch, number = [], number + 1
        if written >= wanted:
            break
    return written


def _endless(source: str | None) -> Iterator[str]:
    import pyarrow.parquet as pq

    from slm_ray.corpus import sample_stories

    stories = pq.read_table(source)["text"].to_pylist() if source else list(sample_stories(0, 20_000))
    copy = 0
    while True:
        yield from (f"{story} This was told {copy} times before." for story in stories)
        copy += 1


def write_tokenizer(source: Path, path: Path) -> Path:
    """One tokenizer for both sides, learned from the first file."""
    import pyarrow.parquet as pq

    from slm_ray.tokenizer import Tokenizer

    texts = pq.read_table(source / "000.parquet")["text"].to_pylist()[:20_000]
    Tokenizer.train(texts, vocab_size=4096).save(path)
    return path


def measure(folder: Path, tokenizer: Path, n_bytes: int, number: int) -> tuple[float, float]:
    """One pair of runs, MB/s each: ours, then the peer."""
    ours = [
        "pipelines/prepare.py", "--runner", "DirectRunner", "--source", str(folder / "input"),
        "--tokenizer", str(tokenizer), "--output", str(folder / f"ours-{number}"),
        "--direct_num_workers", str(WORKERS), "--direct_running_mode", "multi_processing",
    ]  # fmt: skip
    output = str(folder / f"peer-{number}.parquet")
    peer = ["tests/bench/prepare.py", "--peer", str(folder / "input"), str(tokenizer), output]
    speeds = tuple(n_bytes / 1e6 / _seconds(command) for command in (ours, peer))
    print(f"round {number + 1}: ours {speeds[0]:.2f} MB/s, datasets.map {speeds[1]:.2f} MB/s", flush=True)
    return speeds[0], speeds[1]


def _seconds(command: list[str]) -> float:
    environment = dict(os.environ) | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    start = time.perf_counter()
    subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, check=True, capture_output=True)
    return time.perf_counter() - start


def run_peer(source: str, tokenizer_file: str, output: str) -> None:
    """What a user of `datasets` writes: tokenize in batches with two processes, write Parquet."""
    import datasets
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(tokenizer_file)
    end = tokenizer.token_to_id("<|endoftext|>")

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {"tokens": [[*row.ids, end] for row in tokenizer.encode_batch_fast(batch["text"])]}

    with tempfile.TemporaryDirectory() as cache:
        rows = datasets.load_dataset("parquet", data_files=f"{source}/*.parquet", split="train", cache_dir=cache)
        rows.map(encode, batched=True, num_proc=WORKERS, remove_columns=["text"]).to_parquet(output)


if __name__ == "__main__":
    raise SystemExit(main())
