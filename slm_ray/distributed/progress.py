"""Shows how a run goes: a bar on a terminal, plain lines elsewhere.

In: the run's own record, `metrics.jsonl`, as the workers write it. Out: text on stderr, from a thread of the driver,
so that it looks the same with local workers, on a cluster, and in `ray job logs`.
"""

import contextlib
import sys
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from slm_ray import periodic
from slm_ray.runs.history import History, Tail

POLL_S = 0.5
PLAIN_LINE_EVERY_S = 5.0
MIN_PACE_S = 5.0
"""A pace over a shorter time predicts little."""
BAR = "{desc}{percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt}{postfix}"


@contextlib.contextmanager
def show_progress(history: History, max_steps: int, *, is_quiet: bool = False) -> Iterator[None]:
    """Show a run's new lines while the body runs; with `is_quiet`, nothing."""
    if is_quiet:
        yield
        return
    tail = Tail(history.path)
    tail.new_lines()  # of a resumed run
    view = _Bar(max_steps) if sys.stderr.isatty() else _Lines(max_steps)
    said: Counter[str] = Counter()

    def show_new() -> None:
        for line in tail.new_lines():
            view.show(_counted(line, said) if "message" in line else line)

    try:
        with periodic.every(POLL_S, show_new):
            yield
    finally:
        view.close()


def _counted(line: dict[str, Any], said: Counter[str]) -> dict[str, Any]:
    """A message which, when it comes again, says how often it came and when."""
    text = str(line["message"])
    said[text] += 1
    if said[text] == 1:
        return line
    at = f", the last at {line['time'][11:19]}" if "time" in line else ""
    return line | {"message": f"{text} ({said[text]} times{at})"}


class _Lines:
    """Plain lines, at most one in a few seconds for mere steps."""

    def __init__(self, max_steps: int) -> None:
        self.max_steps = max_steps
        self.pace = _Pace(max_steps)
        self.last_s = 0.0

    def show(self, line: dict[str, Any]) -> None:
        is_step = "train_loss" in line
        left = self.pace.left(line) if is_step else ""
        now = time.monotonic()
        if is_step and line["step"] < self.max_steps and now - self.last_s < PLAIN_LINE_EVERY_S:
            return
        self.last_s = now if is_step else self.last_s
        sys.stderr.write(_text(line, self.max_steps, left) + "\n")
        sys.stderr.flush()

    def close(self) -> None:
        pass


class _Bar:
    """A bar with the last figures behind it; messages and validations stand above it."""

    def __init__(self, max_steps: int) -> None:
        self.max_steps = max_steps
        self.pace = _Pace(max_steps)
        self.bar = tqdm(total=max_steps, dynamic_ncols=True, desc="starting workers", bar_format=BAR)

    def show(self, line: dict[str, Any]) -> None:
        if "train_loss" not in line:
            self.bar.write(_text(line, self.max_steps), file=sys.stderr)
            return
        self.bar.set_description("", refresh=False)  # all fits into 80 columns
        figures = [self.pace.left(line), f"loss {line['train_loss']:.3f}", f"lr {line['lr']:.1e}", *_speed(line)]
        self.bar.set_postfix_str(", ".join(figures), refresh=False)
        self.bar.n = line["step"]
        self.bar.refresh()

    def close(self) -> None:
        self.bar.close()


class _Pace:
    """How long a run still takes, as the one who watches sees it: validations and checkpoints count too."""

    def __init__(self, max_steps: int) -> None:
        self.max_steps = max_steps
        self.last_step = 0
        self.first: tuple[int, float] | None = None  # a step, and when it was seen; the ones before may have compiled

    def left(self, line: dict[str, Any]) -> str:
        """`4 min left`, out of a line of figures."""
        step, now = line["step"], time.monotonic()
        if self.first is None or step <= self.last_step:  # the first line, or the workers started again
            self.first = (step, now)
        self.last_step = step
        seen, elapsed = step - self.first[0], now - self.first[1]
        if seen and elapsed > MIN_PACE_S:
            return f"{duration((self.max_steps - step) * elapsed / seen)} left"
        per_step_s = line["tokens"] / step / max(line["tokens_per_s"], 1e-9)
        return f"{duration((self.max_steps - step) * per_step_s)} left"


def duration(seconds: float) -> str:
    """A time as one would say it: `40 s`, `12 min`, `3 h 05 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60:,} h {minutes % 60:02} min"


def _speed(line: dict[str, Any]) -> list[str]:
    """Tokens a second and, where it was measured, the share of the machine's peak (see `training.peak_flops`)."""
    share = [f"{line['mfu']:.0%} of peak"] if "mfu" in line else []
    return [f"{line['tokens_per_s']:,.0f} tokens/s", *share]


def _text(line: dict[str, Any], max_steps: int, left: str = "") -> str:
    if "message" in line:
        return str(line["message"])
    place = f"step {line['step']:,}/{max_steps:,}"
    if "train_loss" in line:
        figures = [f"loss {line['train_loss']:.4f}", f"lr {line['lr']:.2e}", f"gradient {line['grad_norm']:.2f}"]
        return "  ".join([place, *figures, *_speed(line), left])
    sample = f"\n    {line['sample'][:200]!r}" if "sample" in line else ""
    loss = f"{line['val_loss']:.4f} nats, {line['val_bits_per_byte']:.4f} bits per byte"
    return f"{place}  validation by {line.get('val_measure', 'windows')} {loss}{sample}"
