"""Learning per token, one factor at a time: `make bench-learn DATA=data/tinystories`.

Every try trains our model on one pass (or `--share` of one, with the whole schedule) over the training split, without
Ray, and is judged by bits per byte of the validation split, by the fair measure (each story after its own beginning,
longer ones in windows that overlap by half) and in windows cut anywhere; the test split is not touched. What the tries
are is in `learn_tries.py`; what each gave is kept in `learning.md` beside this file. At most 5.3 million parameters;
meant for the real sample. Tries with another vocabulary read the folders beside it (`tinystories-2048`).

Each try writes a line of JSON as it ends; `--table` makes a table of them. On a GPU several tries run at once, in
`--jobs` processes of `--streams` each; with `--combine`, what won is then tried together.
"""

import argparse
import collections
import dataclasses
import json
import multiprocessing
import os
import queue
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from learn_tries import MAX_PARAMETERS, TRIES, config_of, resolved, together, winners
from learn_try import BASE, Try

from slm_ray.model.decoder import parameter_count

Job = tuple[str, int, Try]  # name, seed, resolved
FIRST_SHARE = 0.6
"""Of the time, for the tries of one factor, where what won is tried together after them."""
GUESS_S = 45.0
"""That a try takes beside five others on an H100, before one was timed. All of them share its time: more at once end
later, and a run that is cut off loses them all."""
GRACE = 0.08
"""Of the time: how much later a try that was begun may end."""
STEPS_AT_ONCE = 8


def main() -> int:
    """Run the tries that were asked for."""
    given = arguments()
    if given.list:
        for name in TRIES:
            print(f"{name}: {parameters(name):,} parameters")
        return 0
    if given.table:
        print(table([json.loads(line) for line in Path(given.table).read_text(encoding="utf-8").splitlines()]))
        return 0
    if unknown := [name for name in given.tries if name not in TRIES]:
        sys.stderr.write(f"error: no try is called {unknown[0]!r}: --list names them\n")
        return 2
    lines = Ladder(given).climb()
    print(table(lines))
    return 0


def arguments() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(prog="bench/learn.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", default="data/tinystories", help="data set (default: data/tinystories)")
    parser.add_argument("--share", type=float, default=1.0, help="share of one epoch (default: 1)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of a process (default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds of every try (default: 0)")
    parser.add_argument("--base-seeds", type=int, nargs="+", default=[], help="more seeds of the base")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"), help="(default: fp32; TF32 on a GPU)")
    parser.add_argument("--jobs", type=int, default=1, help="processes (default: 1)")
    parser.add_argument("--streams", type=int, default=1, help="tries of a process at once, on a GPU (default: 1)")
    parser.add_argument("--guess", type=float, default=GUESS_S, help=f"seconds of the first try (default: {GUESS_S:g})")
    parser.add_argument("--until", type=float, default=0.0, help="seconds after which nothing runs (default: no limit)")
    parser.add_argument("--combine", action="store_true", help="then try together what won")
    parser.add_argument("--output", default="learn.jsonl", help="lines are added to it (default: learn.jsonl)")
    parser.add_argument("--table", default="", help="print the table of such a file and leave")
    parser.add_argument("--list", action="store_true", help="name the tries and leave")
    parser.add_argument("tries", nargs="*", help="names (default: all)")
    return parser.parse_args()


def parameters(name: str) -> int:
    """Of a try, whose vocabulary is that of its data set's name."""
    one = resolved(name)
    config = config_of(one, name, data="data/tinystories", seed=0)
    vocabulary = int(one.data.rpartition("-")[2] or 4096)
    found = parameter_count(type(config.model)(**dict(one.changes["model"]) | {"vocab_size": vocabulary}))
    if found > MAX_PARAMETERS:
        raise SystemExit(f"{name}: {found:,} parameters, and at most {MAX_PARAMETERS:,.0f} are allowed")
    return found


class Ladder:
    """All tries, shared out to processes, and what is tried because of them."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given, self.began = given, time.time()
        self.lines: list[dict[str, Any]] = []
        spawn = multiprocessing.get_context("spawn")
        self.jobs, self.done = spawn.Queue(), spawn.Queue()
        self.workers = [spawn.Process(target=work, args=(self.jobs, self.done, given)) for _ in range(given.jobs)]

    def climb(self) -> list[dict[str, Any]]:
        """Run everything; returns the lines."""
        for worker in self.workers:
            worker.start()
        names = self.given.tries or list(TRIES)
        first = [(name, seed) for seed in self.given.seeds for name in names]
        first = [(BASE, seed) for seed in self.given.base_seeds] + first
        until = self.given.until * FIRST_SHARE if self.given.combine else self.given.until
        self._round([(name, seed, resolved(name)) for name, seed in first], until)
        if self.given.combine:
            self._combine()
        for _ in self.workers:
            self.jobs.put(None)
        for worker in self.workers:
            worker.join(30)
        return self.lines

    def _round(self, jobs: list[Job], until: float) -> list[dict[str, Any]]:
        """Run these tries, as many as there is time for until so many seconds after the beginning."""
        deadline = self.began + until if until else 0.0
        for job in jobs:
            self.jobs.put((*job, deadline))
        lines: list[dict[str, Any]] = []
        for _ in jobs:
            line = self._take(deadline)
            if line is None:
                break
            if "fair" in line:
                lines.append(line)
        self.lines += lines
        return lines

    def _take(self, deadline: float) -> dict[str, Any] | None:
        """What the next try gave; None where nobody is left to say, or it is much too late."""
        while any(worker.is_alive() for worker in self.workers):
            if deadline and time.time() > deadline + GRACE * self.given.until:
                return None
            try:
                line: dict[str, Any] = self.done.get(timeout=2)
            except queue.Empty:  # look again whether anybody is left to fill it
                continue
            left = f", {line['windows']:.4f} in windows" if "windows" in line else ""
            said = f"{line['fair']:.4f}{left}" if "fair" in line else line.get("trouble", "left out")
            taken = time.time() - self.began
            print(f"{taken:6.1f} s  {line['try']} (seed {line['seed']}): {said}", file=sys.stderr, flush=True)
            return line
        return None

    def _combine(self) -> None:
        """The winners together, then the best of those at more seeds and rates and without each of its parts."""
        tries = dict(TRIES)
        means = {name: values[0] for name, values in by_name(self.lines).items()}
        if BASE not in means:
            return
        won = winners(means)
        print(f"won: {won}", file=sys.stderr, flush=True)
        for count in range(2, len(won) + 1):
            tries[" + ".join(won[:count])] = together(won[:count])
        combined = [name for name in tries if name not in TRIES]
        lines = self._round([(name, 0, resolved(name, tries)) for name in combined], self.given.until)
        if not won:
            return
        best = min(lines, key=lambda line: line["fair"])["try"] if lines else won[0]
        parts = best.split(" + ")
        last = [(best, 1), (best, 2)]
        rate = resolved(best, tries).changes["optim"]["lr"]
        for name, one in {
            f"{best}, lr x 0.7": Try({"optim": {"lr": rate * 0.7}}, parent=best),
            f"{best}, lr x 1.4": Try({"optim": {"lr": rate * 1.4}}, parent=best),
            f"{best}, 0.7 of an epoch": Try(share=0.7, parent=best),
            **{f"{best}, without {left}": together([one for one in parts if one != left]) for left in parts},
        }.items():
            tries[name] = one
            last.append((name, 0))
        self._round([(name, seed, resolved(name, tries)) for name, seed in last], self.given.until)


def work(jobs: Any, done: Any, given: argparse.Namespace) -> None:
    """A process: take tries, as many at once as it has streams, and run them to their ends."""
    from learn_run import Run  # after `spawn`, in this process alone

    torch.set_num_threads(given.threads or max(1, (os.cpu_count() or 1) // given.jobs))
    torch.set_float32_matmul_precision("high")  # on a CPU no difference
    device = torch.device(given.device)
    running: collections.deque[Running] = collections.deque()
    usual, is_open = given.guess, True
    while is_open or running:
        while is_open and len(running) < given.streams:
            job = _next(jobs, waits=not running)
            if job is NOTHING_YET:
                break
            if job is None:
                is_open = False
                break
            name, seed, one, deadline = job
            config = config_of(one, name, data=given.data, seed=seed, share=given.share)
            size = USUAL_TOKENS / (config.batch_size * config.model.seq_len) * one.share  # of a step, over the usual
            if deadline and time.time() + usual * size > deadline:
                done.put({"try": name, "seed": seed, "trouble": "left out for want of time"})
                continue
            try:
                run = Run(name, config, one.extras, device=device, precision=given.precision)
            except Exception as error:  # one try less
                done.put({"try": name, "seed": seed, "trouble": f"{type(error).__name__}: {error}"[:400]})
                if "CUDA error" in str(error):
                    return
                continue
            running.append(Running(run, deadline, size))
        if running and not advance(running, done, given):
            return
        if running and running[-1].taken_s:
            usual = running.pop().taken_s


NOTHING_YET = object()
USUAL_TOKENS = 2048


def _next(jobs: Any, *, waits: bool) -> Any:
    try:
        return jobs.get(timeout=None if waits else 0.01)
    except queue.Empty:  # or another process was faster
        return NOTHING_YET


@dataclasses.dataclass
class Running:
    """A try in training."""

    run: Any
    deadline: float
    size: float
    """How many times as long as a usual one it should take."""
    began: float = dataclasses.field(default_factory=time.time)
    taken_s: float = 0.0
    """That a usual one would have taken, once it has ended."""


def advance(running: collections.deque[Running], done: Any, given: argparse.Namespace) -> bool:
    """Take the next one a little further; write down what it gave where it has ended, and leave it last with its time.

    Returns whether the device is still sound.
    """
    one = running.popleft()
    run = one.run
    if one.deadline and time.time() > one.deadline + GRACE * given.until:
        done.put({"try": run.name, "seed": run.config.seed, "trouble": f"stopped at step {run.step}"})
        return True
    try:
        if run.stream is not None:
            run.advance(STEPS_AT_ONCE)
        else:
            run.advance_on_cpu(run.max_steps)
        if run.step < run.max_steps:
            running.append(one)
            return True
        line = run.figures()
    except Exception as error:  # one try less
        trouble = f"{type(error).__name__}: {error}"[:400]
        is_lost = "CUDA error" in trouble  # then nothing of this process works any more
        for lost in [one, *(running if is_lost else ())]:
            done.put({"try": lost.run.name, "seed": lost.run.config.seed, "trouble": trouble})
        return not is_lost
    with Path(given.output).open("ab", buffering=0) as file:
        file.write((json.dumps(line) + "\n").encode())  # at once: what is killed keeps what it has
    done.put(line)
    one.taken_s = (time.time() - one.began) / one.size
    one.run = None
    running.append(one)
    return True


def by_name(lines: list[dict[str, Any]]) -> dict[str, tuple[float, float, int]]:
    """Mean, standard deviation and number of the fair measure, by try."""
    found: dict[str, list[float]] = collections.defaultdict(list)
    for line in lines:
        found[line["try"]].append(line["fair"])
    return {
        name: (statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0, len(values))
        for name, values in found.items()
    }


def table(lines: list[dict[str, Any]]) -> str:
    """A row for each try, in the order in which they ended first."""
    rows = [
        "| try | parameters | steps | bits per byte, fair | deviation (n) | in windows |",
        "|---|---|---|---|---|---|",
    ]
    for name, (mean, deviation, count) in by_name(lines).items():
        own = [line for line in lines if line["try"] == name]
        windows = statistics.mean(line["windows"] for line in own)
        spread = f"{deviation:.4f} ({count})" if count > 1 else "(1)"
        rows.append(
            f"| {name} | {own[0]['parameters']:,} | {own[0]['steps']:,} | {mean:.4f} | {spread} | {windows:.4f} |"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    raise SystemExit(main())
