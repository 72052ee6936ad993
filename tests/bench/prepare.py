"""Data preparation against named peers, in one run: `make bench-prepare SOURCE=stories.parquet`.

MB/s of text on this machine's cores, with one given tokenizer: (ours) `pipelines/prepare.py`, the whole job (read,
clean, find duplicates, split, tokenize, write checked shards, report), with two worker processes and with one;
(datasets) `datasets.map(batched=True, num_proc=2)`, which joins white space, tokenizes and writes Parquet;
(datatrove) its reader and `DocumentTokenizer` with two workers. Fresh processes, in turn; ratios are taken round by
round. The input is repeated, each copy with a last sentence of its own, for equal stories would be dropped as
duplicates. The ids of ours and of `datasets` are compared story by story.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WORKERS = 2
STORIES_PER_FILE = 40_000
END = "<|endoftext|>"


def main() -> int:
    """Make the input, run all sides in turn, print a table."""
    parser = argparse.ArgumentParser(prog="bench/prepare.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--source", help="Parquet file with a text column (default: the sample corpus)")
    parser.add_argument("--megabytes", type=float, default=480.0, help="size of the input, MB of text (default: 480)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side (default: 3)")
    parser.add_argument("--peer", nargs=4, metavar=("NAME", "INPUT", "TOKENIZER", "OUTPUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:
        PEERS[options.peer[0]](*options.peer[1:])
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        n_bytes = write_input(folder / "input", options.source, megabytes=options.megabytes)
        tokenizer = write_tokenizer(folder / "input", folder / "tokenizer.json")
        print(f"input: {n_bytes / 1e6:.1f} MB of text; {os.cpu_count()} cores", flush=True)
        sides = {
            "ours, 2 workers": ours(folder, tokenizer, WORKERS),
            "ours, 1 worker": ours(folder, tokenizer, 1),
            "datasets.map, 2 processes": peer("datasets", folder, tokenizer),
            "datatrove, 2 workers": peer("datatrove", folder, tokenizer),
        }
        speeds = [measure(sides, n_bytes, number) for number in range(options.rounds)]
        compare_ids(folder)
    print_table(speeds)
    return 0


def write_input(folder: Path, source: str | None, *, megabytes: float | None = None, stories: int = 0) -> int:
    """Stories repeated to the wanted size or number, each copy with an ending of its own. Returns bytes of text."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir()
    written, batch, number = 0, [], 0
    for count, story in enumerate(_endless(source), start=1):
        batch.append(story)
        written += len(story.encode())
        is_enough = count == stories if megabytes is None else written >= megabytes * 1e6
        if len(batch) == STORIES_PER_FILE or is_enough:
            pq.write_table(pa.table({"text": batch}), folder / f"{number:03d}.parquet", compression="zstd")
            batch, number = [], number + 1
        if is_enough:
            break
    return written


def _endless(source: str | None) -> Iterator[str]:
    """Stories whose cleaning is joining white space alone, so that all sides encode the same text."""
    import pyarrow.parquet as pq

    from slm_ray.corpus.grammar import sample_stories
    from slm_ray.preparation.cleaning import CleaningRules, examine

    stories = pq.read_table(source)["text"].to_pylist() if source else list(sample_stories(0, 20_000))
    stories = [text for text in stories if examine(text.encode(), CleaningRules()) == (" ".join(text.split()), None)]
    copy = 0
    while True:
        yield from (f"{story} This was told {copy} times before." for story in stories)
        copy += 1


def write_tokenizer(source: Path, path: Path) -> Path:
    """One tokenizer for all sides, learned from the first file."""
    import pyarrow.parquet as pq

    from slm_ray.tokenization.training import train_bpe

    texts = pq.read_table(source / "000.parquet")["text"].to_pylist()[:20_000]
    train_bpe((" ".join(text.split()) for text in texts), vocab_size=4096).save(path)
    return path


def ours(folder: Path, tokenizer: Path, workers: int) -> Callable[[int], list[str]]:
    """The command of a round."""
    multi = ["--direct_num_workers", str(workers), "--direct_running_mode", "multi_processing"]
    return lambda number: [
        "pipelines/prepare.py", "--runner", "DirectRunner", "--source", str(folder / "input"),
        "--validation-fraction", "0", "--test-fraction", "0", "--tokenizer", str(tokenizer),
        "--output", str(folder / f"ours-{workers}-{number}"),
        *(multi if workers > 1 else []),
    ]  # fmt: skip


def peer(name: str, folder: Path, tokenizer: Path) -> Callable[[int], list[str]]:
    """The command of a round."""
    return lambda number: [
        "tests/bench/prepare.py", "--peer", name,
        str(folder / "input"), str(tokenizer), str(folder / f"{name}-{number}"),
    ]  # fmt: skip


def measure(sides: dict[str, Callable[[int], list[str]]], n_bytes: int, number: int) -> dict[str, float]:
    """One round: MB/s of each side."""
    speeds = {name: n_bytes / 1e6 / _seconds(command(number)) for name, command in sides.items()}
    shown = ", ".join(f"{name} {speed:.2f}" for name, speed in speeds.items())
    print(f"round {number + 1}, MB/s: {shown}", flush=True)
    return speeds


def print_table(speeds: list[dict[str, float]]) -> None:
    """Medians, and ours over each, as a Markdown table."""
    first = next(iter(speeds[0]))
    print("| side | MB/s of text | ours (2 workers) is faster by |\n|---|---|---|")
    for name in speeds[0]:
        ratios = [round_[first] / round_[name] for round_ in speeds]
        listed = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        median = statistics.median(round_[name] for round_ in speeds)
        print(f"| {name} | {median:.2f} | {statistics.median(ratios):.2f} ({listed}) |")


def compare_ids(folder: Path) -> None:
    """Every story has the same ids here and there, in the same order; one worker and two wrote the same data set."""
    import pyarrow.parquet as pq

    two, one = (folder / f"ours-{workers}-0" for workers in (WORKERS, 1))
    fingerprints = [json.loads((data / "manifest.json").read_text())["fingerprint"] for data in (two, one)]
    tables = [pq.read_table(path, columns=["tokens"]) for path in sorted((two / "train").glob("*.parquet"))]
    here = (row for table in tables for row in table["tokens"].to_pylist())
    there = iter(pq.read_table(folder / "datasets-0", columns=["tokens"])["tokens"].to_pylist())
    n_stories = n_equal = 0
    for tokens, others in zip(here, there, strict=True):
        n_stories += 1
        n_equal += tokens == others
    print(f"{n_equal:,} of {n_stories:,} stories have the same ids as with datasets.map")
    print(f"one and two workers: {'the same' if len(set(fingerprints)) == 1 else 'ANOTHER'} fingerprint")
    if n_equal != n_stories or len(set(fingerprints)) > 1:
        raise SystemExit("error: the sides do not agree")


def _seconds(command: list[str]) -> float:
    environment = dict(os.environ) | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return time.perf_counter() - start


def run_datasets(source: str, tokenizer_file: str, output: str) -> None:
    """What a user of `datasets` writes: tokenize in batches with two processes, write Parquet."""
    import datasets
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(tokenizer_file)
    end = tokenizer.token_to_id(END)

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        texts = [" ".join(text.split()) for text in batch["text"]]
        return {"tokens": [[*row.ids, end] for row in tokenizer.encode_batch_fast(texts)]}

    with tempfile.TemporaryDirectory() as cache:
        rows = datasets.load_dataset("parquet", data_files=f"{source}/*.parquet", split="train", cache_dir=cache)
        rows.map(encode, batched=True, num_proc=WORKERS, remove_columns=["text"]).to_parquet(output)


def run_datatrove(source: str, tokenizer_file: str, output: str) -> None:
    """datatrove's tokenize step: its Parquet reader and its tokenizer, which writes flat files of ids."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import ParquetReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    steps = [
        ParquetReader(source, glob_pattern="*.parquet"),
        DocumentTokenizer(output, tokenizer_file, eos_token=END, shuffle_documents=False),
    ]
    n_files = len(list(Path(source).glob("*.parquet")))
    executor = LocalPipelineExecutor(steps, tasks=n_files, workers=WORKERS, logging_dir=f"{output}-log")
    executor.run()


PEERS = {"datasets": run_datasets, "datatrove": run_datatrove}

if __name__ == "__main__":
    raise SystemExit(main())
