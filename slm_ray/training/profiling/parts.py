"""The time of a step by part, and how much of the machine's peak each part reaches.

In: what torch's profiler recorded of some steps, within the marks that `part` left. Out: rows of a table. Each
operator's own time goes to the innermost mark around it, and there to what it is: a matrix product of a linear layer,
attention, the loss, or the rest, which is norms, residuals, activations, casts and Python.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch

MARK = "step: "
OPTIMIZER = "Optimizer.step#"
"""torch's own mark around an optimizer's step, before its class."""
BACKWARD_THREAD = "autograd::engine::evaluate_function"
"""On a GPU the backward pass runs in a thread of its own, without the marks of the first."""
PRODUCTS = frozenset(f"aten::{name}" for name in ("mm", "addmm", "bmm", "baddbmm"))
BATCHED = frozenset({"aten::bmm", "aten::baddbmm"})
ATTENTION = ("aten::_scaled_dot_product", "aten::_flash_attention", "aten::_efficient_attention")
LOSS = "slm_ray::linear_cross_entropy"
EXCHANGE = ("c10d::", "gloo:", "nccl:")
ORDER = ("data", "forward", "backward", "clipping")


def part(name: str) -> torch.profiler.record_function:
    """Mark the body as this part of a step, for a profiler that may be watching; else it costs microseconds."""
    return torch.profiler.record_function(MARK + name)


@dataclasses.dataclass(frozen=True)
class Row:
    """One part of the mean step."""

    name: str
    ms: float
    gflop: float
    """Of matrix products; 0 where the profiler does not count them."""


def rows(events: Iterable[Any], n_steps: int, *, on_gpu: bool = False) -> list[Row]:
    """The parts of the mean of `n_steps` recorded steps, in their order; what lies outside of all marks is `other`.

    events: those of `torch.profiler.profile`, made with `with_flops`.
    """
    times: dict[tuple[str, str], float] = defaultdict(float)
    operations: dict[tuple[str, str], float] = defaultdict(float)
    for event in events:
        own = event.self_device_time_total if on_gpu else event.self_cpu_time_total  # in microseconds
        names = list(_outwards(event))
        key = (_part(names), _kind(names))
        times[key] += own
        if event.name in PRODUCTS:
            operations[key] += event.flops or 0
    found = [
        Row(
            f"{name}: {kind}" if kind else name,
            times[name, kind] / n_steps / 1e3,
            operations[name, kind] / n_steps / 1e9,
        )
        for name, kind in sorted(times, key=_rank)
    ]
    return [row for row in found if row.ms > 0]


def _outwards(event: Any) -> Iterator[str]:
    while event is not None:
        yield event.name
        event = event.cpu_parent


def _part(names: list[str]) -> str:
    for name in names:
        if name.startswith(MARK):
            return name.removeprefix(MARK)
        if name.startswith(OPTIMIZER):
            return name.removeprefix(OPTIMIZER).removesuffix(".step")
    return "backward" if any(name.startswith(BACKWARD_THREAD) for name in names) else "other"


def _kind(names: list[str]) -> str:
    """What an operator, whose name comes first, does in its part; empty for a part that is not taken apart."""
    is_pass = _part(names) in ("forward", "backward")
    if any(name.startswith(EXCHANGE) for name in names):
        return "exchange between workers"
    if is_pass and LOSS in names:
        return "output layer and loss"
    if is_pass and (names[0] in BATCHED or any(name.startswith(ATTENTION) for name in names)):
        return "attention"
    if names[0] in PRODUCTS:
        return "linear layers" if is_pass else "products"
    return "the rest" if is_pass or _part(names) == "Muon" else ""


def _rank(key: tuple[str, str]) -> tuple[int, str, bool, str]:
    name, kind = key
    number = ORDER.index(name) if name in ORDER else len(ORDER) + (name == "other")
    return number, name, kind in ("the rest", ""), kind


def table(found: list[Row], *, peak: float, step_flop: float) -> str:
    """The rows as text. peak: operations a second of this worker, 0 if unknown. step_flop: its model's in a step."""
    whole = Row("the whole step, by the model's FLOPs", sum(row.ms for row in found), step_flop / 1e9)
    width = max(len(row.name) for row in [whole, *found])
    lines = [f"{'part of a step':{width}}  {'ms':>8}  {'share':>6}  {'GFLOP/s':>8}  {'of peak':>8}"]
    for row in [*found, whole]:
        rate = row.gflop / row.ms * 1e3 if row.ms else 0.0
        shown = f"{rate:8,.0f}" + (f"  {rate * 1e9 / peak:8.0%}" if peak else "") if rate else ""
        lines.append(f"{row.name:{width}}  {row.ms:8.1f}  {row.ms / (whole.ms or 1):6.1%}  {shown}".rstrip())
    return "\n".join(lines) + "\n"
