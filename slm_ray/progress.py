"""Shows how a run goes: a bar on a terminal, plain lines elsewhere.

In: the run's own record, `metrics.jsonl`, as the workers write it. Out: text on stderr, from a thread of the driver,
so that it looks the same with local workers, on a cluster, and in `ray job logs`.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from slm_ray.history import History

POLL_S = 0.5
PLAIN_LINE_EVERY_S = 5.0


@contextlib.contextmanager
def watch(history: History, max_steps: int, *, is_quiet: bool = False) -> Iterator[None]:
    """Show a run's new lines while the body runs; with `is_quiet`, nothing."""
    if is_quiet:
        yield
        return
    is_over = threading.Event()
    seen = {str(line) for line in history.lines()}  # of a resumed run
    view = _Bar(max_steps) if sys.stderr.isatty() else _Lines(max_steps)
    thread = threading.Thread(target=_follow, args=(history, view, is_over, seen), daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
        view.close()


class _Lines:
    """Plain lines, at most one in a few seconds for mere steps."""

    def __init__(self, max_steps: int) -> None:
        self.max_steps = max_steps
        self.last_s = 0.0

    def show(self, line: dict[str, Any]) -> None:
        is_step = "train_loss" in line
        now = time.monotonic()
        if is_step and line["step"] < self.max_steps and now - self.last_s < PLAIN_LINE_EVERY_S:
            return
        self.last_s = now if is_step else self.last_s
        sys.stderr.write(_text(line, self.max_steps) + "\n")
        sys.stderr.flush()

    def close(self) -> None:
        pass


class _Bar:
    """A bar with the last figures behind it; messages and validations stand above it."""

    def __init__(self, max_steps: int) -> None:
        self.max_steps = max_steps
        self.bar = tqdm(total=max_steps, unit="step", dynamic_ncols=True, desc="starting workers")

    def show(self, line: dict[str, Any]) -> None:
        if "train_loss" not in line:
            self.bar.write(_text(line, self.max_steps), file=sys.stderr)
            return
        self.bar.set_description("training", refresh=False)
        figures = f"loss {line['train_loss']:.3f}, lr {line['lr']:.1e}, {line['tokens_per_s']:,.0f} tokens/s"
        self.bar.set_postfix_str(figures, refresh=False)
        self.bar.n = line["step"]
        self.bar.refresh()

    def close(self) -> None:
        self.bar.close()


def _text(line: dict[str, Any], max_steps: int) -> str:
    if "message" in line:
        return str(line["message"])
    place = f"step {line['step']:,}/{max_steps:,}"
    if "train_loss" in line:
        left_s = (max_steps - line["step"]) * line["tokens"] / line["step"] / max(line["tokens_per_s"], 1e-9)
        return (
            f"{place}  loss {line['train_loss']:.4f}  lr {line['lr']:.2e}  gradient {line['grad_norm']:.2f}  "
            f"{line['tokens_per_s']:,.0f} tokens/s  {left_s / 60:.1f} min left"
        )
    sample = f"\n    {line['sample'][:200]!r}" if "sample" in line else ""
    return f"{place}  validation {line['val_loss']:.4f} nats, {line['val_bits_per_byte']:.4f} bits per byte{sample}"


def _follow(history: History, view: _Lines | _Bar, is_over: threading.Event, seen: set[str]) -> None:
    while True:
        is_last = is_over.wait(POLL_S)
        for line in history.lines():  # a restart cuts the record back and writes anew: count nothing, remember
            if str(line) not in seen:
                seen.add(str(line))
                view.show(line)
        if is_last:
            return
