"""What this design would do at sizes that no one here can measure: on paper, and simulated where queues matter.

    python tests/bench/scale.py            # all three tables

In: rates measured on two cores (`README.md` beside this file), as options. Out: for 100 GB and 10 TB of text, for 10
billion tokens, and for 1,000 and 100,000 readers, how long it would take, and the figure that breaks first. Nothing
here was measured at these sizes; each figure that is assumed says so.
"""

import argparse
import dataclasses
import itertools
import random
import statistics
from collections.abc import Iterator

import simpy

GB, TB = 1e9, 1e12
MIB = 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rates:
    """What was measured; the defaults are of two AVX-512 cores."""

    prepare_mb_per_s: float = 21.6
    """Of one worker, one core (`bench-prepare`)."""
    train_tokens_per_s: float = 2_100.0
    """Of one worker of one core, bf16, in a group (`bench-train`, half of two workers)."""
    engine_tokens_per_s: tuple[tuple[int, float], ...] = ((1, 2_586.0), (4, 4_151.0), (16, 5_623.0), (32, 6_010.0))
    """Of a replica of two cores, by stories at once (`bench-serve`)."""
    parts_per_s: float = 16_000.0
    """Parts of streams that one proxy forwards (Ray Serve's own, streams of 32, two busy cores)."""
    parts_per_story: float = 13.0
    """Into which a story of 200 tokens arrives, at 16 streams."""
    swing: float = 0.1
    """Standard deviation of the logarithm of a worker's time for a step: the speed of shared cores swings."""


# Preparation ---------------------------------------------------------------------------------------------------------

STORY_BYTES = 810
"""Mean of TinyStories."""
SHUFFLED_BYTES = 48
"""Of a story in the search for duplicates: 16 of hash, its place, what Beam adds (assumed)."""
FILE_BYTES = 256e6
SECONDS_PER_FILE = 0.05
"""To read a file's length from an object store, one after another, before the job starts (assumed)."""
SHUFFLE_BYTES_PER_S = 50e6
"""Of a worker, to disk and network and back (assumed)."""


def preparation(rates: Rates) -> list[str]:
    """A row for each amount of text and of workers."""
    lines = [
        "| text | workers | stories | cleaning and tokenizing | shuffle of hashes | counting files | first to break |",
        "|---|---|---|---|---|---|---|",
    ]
    for n_bytes, workers in ((100 * GB, 16), (100 * GB, 128), (10 * TB, 128), (10 * TB, 1024)):
        stories = n_bytes / STORY_BYTES
        work = 2 * n_bytes / (rates.prepare_mb_per_s * 1e6 * workers)  # cleaned files are read a second time
        shuffled = stories * SHUFFLED_BYTES
        shuffle = 2 * shuffled / (SHUFFLE_BYTES_PER_S * workers)
        counting = n_bytes / FILE_BYTES * SECONDS_PER_FILE
        names = {"the work itself": work, "shuffled hashes": shuffle, "files counted by one process": counting}
        lines.append(
            f"| {_size(n_bytes)} | {workers} | {stories / 1e6:,.0f} M | {_time(work)} | {_size(shuffled)}, "
            f"{_time(shuffle)} | {_time(counting)} | {max(names, key=lambda name: names[name])} |"
        )
    return lines


# Training ------------------------------------------------------------------------------------------------------------

PARAMETERS = 5_065_472
SEQ_LEN = 128
TOKENS = 10e9
NETWORKS = (("1 Gbit/s", 125e6), ("10 Gbit/s", 1.25e9))
LATENCY_S = 100e-6
"""Of a message between two machines (assumed)."""


def training(rates: Rates, seed: int = 0) -> list[str]:
    """A row for each group and network: a step waits for its slowest worker and for the sum of gradients."""
    lines = [
        "| workers | network | sequences a worker | a step: work, waiting, sum | tokens/s | of all workers alone "
        "| 10 billion tokens |",
        "|---|---|---|---|---|---|---|",
    ]
    draw = random.Random(seed)
    for workers in (2, 8, 64):
        for network, bytes_per_s in NETWORKS:
            for rows in (8, 32):
                work = rows * SEQ_LEN / rates.train_tokens_per_s
                steps = [max(draw.lognormvariate(0, rates.swing) for _ in range(workers)) * work for _ in range(400)]
                waited = statistics.fmean(steps) - work
                share = 2 * (workers - 1) / workers
                summed = share * 4 * PARAMETERS / bytes_per_s + 2 * (workers - 1) * LATENCY_S
                speed = workers * rows * SEQ_LEN / (work + waited + summed)
                alone = speed / (workers * rates.train_tokens_per_s)
                lines.append(
                    f"| {workers} | {network} | {rows} | {work:.2f}, {waited:.2f}, {summed:.2f} s | {speed:,.0f} "
                    f"| {alone:.2f} | {_time(TOKENS / speed)} |"
                )
    return lines


# Serving -------------------------------------------------------------------------------------------------------------

ROWS, WAITING = 8, 64
STORY_TOKENS = 200
READING_S = 60.0
"""Between the end of a story and the next that a reader asks for."""
RETRY_S = 2.0
SIMULATED_S, SETTLING_S = 90.0, 30.0
AT_ONCE = 10
"""Tokens of all rows that a replica of the simulation writes in one event."""


@dataclasses.dataclass
class Outcome:
    """What the readers of one simulation saw."""

    first_part_s: list[float] = dataclasses.field(default_factory=list)
    story_s: list[float] = dataclasses.field(default_factory=list)
    refused: int = 0


class Replica:
    """Slots, a line before them, and a speed that all its rows share."""

    def __init__(self, env: simpy.Environment, rates: Rates) -> None:
        self.env, self.rates = env, rates
        self.running: list[list[object]] = []  # [tokens left, when the first part is there, when all is]
        self.line: list[list[object]] = []
        self.wake = env.event()
        env.process(self._write())

    @property
    def load(self) -> int:
        return len(self.running) + len(self.line)

    def ask(self) -> tuple[simpy.Event, simpy.Event] | None:
        """Events of the first part and of the end; None where there is no room."""
        if self.load >= ROWS + WAITING:
            return None
        events = self.env.event(), self.env.event()
        self.line.append([STORY_TOKENS, *events])
        if not self.wake.triggered:
            self.wake.succeed()
        return events

    def _write(self) -> Iterator[simpy.Event]:
        while True:
            while self.line and len(self.running) < ROWS:
                self.running.append(self.line.pop(0))
            if not self.running:
                self.wake = self.env.event()
                yield self.wake
                continue
            rows = len(self.running)
            yield self.env.timeout(AT_ONCE * rows / self._speed(rows))
            for story in self.running:
                if story[0] == STORY_TOKENS:
                    story[1].succeed()  # type: ignore[attr-defined]
                story[0] -= AT_ONCE  # type: ignore[operator]
                if story[0] <= 0:  # type: ignore[operator]
                    story[2].succeed()  # type: ignore[attr-defined]
            self.running = [story for story in self.running if story[0] > 0]  # type: ignore[operator]

    def _speed(self, rows: int) -> float:
        """Between the measured numbers of stories at once, straight lines."""
        known = self.rates.engine_tokens_per_s
        for (low, slow), (high, fast) in itertools.pairwise(known):
            if rows <= high:
                return slow + (fast - slow) * (rows - low) / (high - low)
        return known[-1][1]


def simulate(rates: Rates, readers: int, replicas: int, proxies: int, seed: int = 0) -> Outcome:
    """Readers that ask for a story, read it, and ask again; requests go to the emptier of two replicas, as Serve sends
    them, and each part of a story passes a proxy, which forwards one after another."""
    env, draw, outcome = simpy.Environment(), random.Random(seed), Outcome()
    group = [Replica(env, rates) for _ in range(replicas)]
    doors = [simpy.Resource(env) for _ in range(proxies)]

    def forwarded(door: simpy.Resource, parts: float) -> Iterator[simpy.Event]:
        with door.request() as turn:
            yield turn
            yield env.timeout(parts / rates.parts_per_s)

    def reader() -> Iterator[simpy.Event]:
        door = draw.choice(doors)
        yield env.timeout(draw.expovariate(1 / READING_S))  # as if all had been at it for long
        while True:
            began = env.now
            while (events := min(draw.choices(group, k=2), key=lambda one: one.load).ask()) is None:
                outcome.refused += began >= SETTLING_S
                yield env.timeout(RETRY_S)
            yield events[0]
            yield from forwarded(door, 1)
            first = env.now
            yield events[1]
            yield from forwarded(door, rates.parts_per_story - 1)
            if began >= SETTLING_S:
                outcome.first_part_s.append(first - began)
                outcome.story_s.append(env.now - began)
            yield env.timeout(draw.expovariate(1 / READING_S))

    for _ in range(readers):
        env.process(reader())
    env.run(until=SIMULATED_S)
    return outcome


def serving(rates: Rates) -> list[str]:
    """A row for each number of readers, replicas and proxies."""
    lines = [
        "| readers | replicas | proxies | stories/s | first part, p50, p99 | whole story, p50, p99 | answered 429 |",
        "|---|---|---|---|---|---|---|",
    ]
    for readers, replicas, proxies in (
        (1_000, 1, 1),
        (1_000, 2, 1),
        (100_000, 64, 1),
        (100_000, 96, 1),
        (100_000, 96, 8),
    ):
        found = simulate(rates, readers, replicas, proxies)
        speed = len(found.story_s) / (SIMULATED_S - SETTLING_S)
        lines.append(
            f"| {readers:,} | {replicas} | {proxies} | {speed:,.0f} | {_quantiles(found.first_part_s)} "
            f"| {_quantiles(found.story_s)} | {found.refused / max(1, found.refused + len(found.story_s)):.1%} |"
        )
        print(f"simulated {readers:,} readers, {replicas} replicas, {proxies} proxies", flush=True)
    return lines


def _quantiles(values: list[float]) -> str:
    if len(values) < 2:
        return "none finished"
    cuts = statistics.quantiles(values, n=100)
    return f"{_time(cuts[49])}, {_time(cuts[98])}"


def _time(seconds: float) -> str:
    for unit, size in (("days", 86_400), ("h", 3_600), ("min", 60), ("s", 1)):
        if seconds >= 2 * size or unit == "s":
            return f"{seconds / size:.1f} {unit}" if seconds >= 0.1 else f"{seconds * 1e3:.0f} ms"
    raise AssertionError


def _size(n_bytes: float) -> str:
    return f"{n_bytes / TB:,.1f} TB" if n_bytes >= TB else f"{n_bytes / GB:,.0f} GB"


def main() -> int:
    """Print the three tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in dataclasses.fields(Rates):
        if isinstance(field.default, float):
            parser.add_argument(f"--{field.name.replace('_', '-')}", type=float, default=field.default)
    given = Rates(**vars(parser.parse_args()))
    rows = serving(given)
    for title, table in (("Preparation", preparation(given)), ("Training", training(given)), ("Serving", rows)):
        print(f"\n## {title}\n\n" + "\n".join(table))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
