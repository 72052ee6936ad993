"""Data preparation against named peers, in one run: `make bench-prepare SOURCE=stories.parquet`.

MB/s of text on this machine's cores, with one given tokenizer: (ours) `pipelines/prepare.py`, the whole job (read,
clean, find duplicates, split, tokenize, write checked shards, report), with two worker processes and with one;
(limit) a bare script of two processes that reads Parquet, encodes with the library that ours uses and writes Parquet as
ours does, and nothing else: it neither cleans nor compares nor counts; (datasets) `datasets.map(batched=True,
num_proc=2)`, which joins white space, tokenizes and writes Parquet; (datatrove) its reader and `DocumentTokenizer` with
two workers. Fresh processes, in turn; ratios are taken round by round. The input is repeated, each copy with a last
sentence of its own, for equal stories would be dropped as duplicates. The ids of ours and of `datasets` are compared
story by story. `--side ours-2 --side limit` leaves the others out.
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

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))
from tests.bench.machine import machine_line

WORKERS = 2
STORIES_PER_FILE = 40_000
END = "<|endoftext|>"


def main() -> int:
    """Make the input, run all sides in turn, print a table."""
    parser = argparse.ArgumentParser(prog="bench/prepare.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--source", help="Parquet file with a text column (default: the sample corpus)")
    parser.add_argument("--megabytes", type=float, default=480.0, help="size of the input, MB of text (default: 480)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side (default: 3)")
    parser.add_argument("--side", action="append", choices=NAMES, help="one of them; repeat it (default: all)")
    parser.add_argument("--peer", nargs=4, metavar=("NAME", "INPUT", "TOKENIZER", "OUTPUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:
        PEERS[options.peer[0]](*options.peer[1:])
        return 0
    wanted = options.side or list(NAMES)
    print(machine_line(), flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        print(f"making {options.megabytes:.0f} MB of text and a tokenizer", flush=True)
        n_bytes = write_input(folder / "input", options.source, megabytes=options.megabytes)
        tokenizer = write_tokenizer(folder / "input", folder / "tokenizer.json")
        sides = {name: command_of(name, folder, tokenizer) for name in NAMES if name in wanted}
        speeds = [measure(sides, n_bytes, number) for number in range(options.rounds)]
        compare(folder, wanted)
    print_table(speeds)
    return 0


def command_of(name: str, folder: Path, tokenizer: Path) -> Callable[[int], list[str]]:
    """The command of each round of a side."""
    kind, _, workers = name.partition("-")
    return ours(folder, tokenizer, int(workers)) if kind == "ours" else peer(name, folder, tokenizer)


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
        "tests/bench/preparation/prepare.py", "--peer", name,
        str(folder / "input"), str(tokenizer), str(folder / f"{name}-{number}"),
    ]  # fmt: skip


def measure(sides: dict[str, Callable[[int], list[str]]], n_bytes: int, number: int) -> dict[str, float]:
    """One round: MB/s of each side."""
    speeds = {}
    for name, command in sides.items():
        speeds[name] = n_bytes / 1e6 / _seconds(command(number))
        print(f"round {number + 1}: {NAMES[name]} {speeds[name]:.1f} MB/s", flush=True)
    return speeds


def print_table(speeds: list[dict[str, float]]) -> None:
    """Medians, and the first side over each, as a Markdown table."""
    first = next(iter(speeds[0]))
    print(f"| side | MB/s of text | {NAMES[first]} is faster by |\n|---|---|---|")
    for name in speeds[0]:
        ratios = [round_[first] / round_[name] for round_ in speeds]
        listed = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        median = statistics.median(round_[name] for round_ in speeds)
        print(f"| {NAMES[name]} | {median:.2f} | {statistics.median(ratios):.2f} ({listed}) |")


def compare(folder: Path, sides: list[str]) -> None:
    """Of the sides that ran: one worker and two wrote the same data set, with the ids of `datasets`, in its order."""
    ran = [folder / f"{name}-0" for name in ("ours-2", "ours-1") if name in sides]
    fingerprints = {json.loads((data / "manifest.json").read_text())["fingerprint"] for data in ran}
    if len(ran) > 1:
        print(f"one and two workers: {'the same' if len(fingerprints) == 1 else 'ANOTHER'} fingerprint")
    n_stories, n_equal = count_equal(ran[0], folder / "datasets-0") if ran and "datasets" in sides else (0, 0)
    if n_stories:
        print(f"{n_equal:,} of {n_stories:,} stories have the same ids as with datasets.map")
    if n_equal != n_stories or len(fingerprints) > 1:
        raise SystemExit("error: the sides do not agree")


def count_equal(data: Path, theirs: Path) -> tuple[int, int]:
    """How many stories there are, and how many of them have the same ids in both."""
    import pyarrow.parquet as pq

    tables = [pq.read_table(path, columns=["tokens"]) for path in sorted((data / "train").glob("*.parquet"))]
    here = (row for table in tables for row in table["tokens"].to_pylist())
    there = iter(pq.read_table(theirs, columns=["tokens"])["tokens"].to_pylist())
    are_equal = [tokens == others for tokens, others in zip(here, there, strict=True)]
    return len(are_equal), sum(are_equal)


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


def run_limit(source: str, tokenizer_file: str, output: str) -> None:
    """Nothing but reading, encoding and writing, a file at a time on each of two processes."""
    import multiprocessing

    Path(output).mkdir()
    files = sorted(Path(source).glob("*.parquet"))
    with multiprocessing.Pool(WORKERS) as pool:
        pool.starmap(encode_file, [(str(path), tokenizer_file, output) for path in files], chunksize=1)


def encode_file(path: str, tokenizer_file: str, output: str) -> None:
    """One file of texts to one of ids, written with the options of our shards."""
    import awkward as ak
    import gigatoken
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    tokenizer = gigatoken.Tokenizer.from_json(Path(tokenizer_file).read_text(encoding="utf-8"))
    texts = pq.read_table(path, columns=["text"])["text"].combine_chunks().cast(pa.large_string())
    _, starts, content = texts.buffers()
    characters = ak.contents.NumpyArray(np.frombuffer(content, np.uint8), parameters={"__array__": "char"})
    offsets = ak.index.Index64(np.frombuffer(starts, np.int64)[: len(texts) + 1])
    strings = ak.contents.ListOffsetArray(offsets, characters, parameters={"__array__": "string"})
    found = ak.to_layout(tokenizer.encode_batch(ak.Array(strings), parallel=False))
    ids, ends = np.asarray(found.content.data), np.asarray(found.offsets.data)
    tokens = pa.ListArray.from_arrays(pa.array(ends, pa.int32()), pa.array(ids[: ends[-1]].astype(np.uint16)))
    pq.write_table(
        pa.table({"tokens": tokens}),
        Path(output) / Path(path).name,
        compression="zstd",
        compression_level=3,
        use_dictionary=False,
        write_statistics=False,
    )


PEERS = {"datasets": run_datasets, "datatrove": run_datatrove, "limit": run_limit}
NAMES = {
    "ours-2": "ours, 2 workers",
    "ours-1": "ours, 1 worker",
    "limit": "limit: read, encode, write, 2 processes",
    "datasets": "datasets.map, 2 processes",
    "datatrove": "datatrove, 2 workers",
}

if __name__ == "__main__":
    raise SystemExit(main())
