"""How preparation grows with its input, 17 MB to 1.9 GB (the whole of TinyStories): time and memory.

    python tests/bench/preparation/prepare_growth.py [--source stories.parquet] [--megabytes 17 170 1900]

Runs `pipelines/prepare.py` with two worker processes, which trains its tokenizer on the way, on stories repeated to
each size (see `prepare.py`). The speed of what is more counts what a size has beyond the one before: without what
every run takes to start and to end. Linux only, as `prepare_memory.py`.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import prepare as bench  # the other scripts of this folder
import prepare_memory

from tests.bench.machine import machine_line


def main() -> int:
    """Prepare each size, print a table."""
    parser = argparse.ArgumentParser(prog="bench/prepare_growth.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--source", help="Parquet file with a text column (default: the sample corpus)")
    parser.add_argument("--megabytes", nargs="+", type=float, default=(17, 170, 1900), help="sizes, MB of text")
    options = parser.parse_args()
    print(machine_line(), flush=True)
    print("| MB | seconds | MB/s | MB/s of what is more | main process, MiB | largest worker, MiB | all, MiB |")
    print("|---|---|---|---|---|---|---|", flush=True)
    before = (0.0, 0.0)
    for megabytes in options.megabytes:
        with tempfile.TemporaryDirectory() as scratch:
            size = bench.write_input(Path(scratch) / "input", options.source, megabytes=megabytes) / 1e6
            started = time.perf_counter()
            peaks = [f"{peak / 2**20:.0f}" for peak in prepare_memory.peak_memory(Path(scratch))]
            seconds = time.perf_counter() - started
        more = f"{(size - before[0]) / (seconds - before[1]):.1f}" if before[0] else ""
        print(f"| {size:.0f} | {seconds:.1f} | {size / seconds:.1f} | {more} | {' | '.join(peaks)} |", flush=True)
        before = size, seconds
    return 0


if __name__ == "__main__":
    sys.exit(main())
