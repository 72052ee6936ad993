"""A sweep in pictures: heat map, parallel coordinates, learning curves.

In: trials with their values, the best first. Out: PNG files.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tune.results import METRIC, Trial, TrialStatus, value_text
from tune.space import short_name

MAX_CELLS_PER_TRIAL = 3
"""Of a heat map; with more empty cells than that, points say more."""
LOG_RATIO = 10
"""Between the largest and the smallest of values above 0, from which on an axis is logarithmic."""
LABEL = "validation bits per byte"
BOX = {"facecolor": "black", "alpha": 0.6, "edgecolor": "none"}  # readable on every colour


def fields_that_vary_most(trials: Sequence[Trial]) -> list[str]:
    """Up to two fields with the most values among the trials, in the order of the space."""
    counts = {field: len({trial.point[field] for trial in trials}) for field in trials[0].point}
    most = sorted(counts, key=lambda field: -counts[field])[:2]  # stable
    return [field for field in counts if field in most]


def draw_heat_map(trials: Sequence[Trial], fields: Sequence[str], path: Path) -> None:
    """Bits per byte over one field (across) and another (up); of several trials at one place the best.

    A missing point stays blank. Where trials lie too far apart for cells, each is a point. A trial that was stopped
    early names its step.
    """
    across, up = (*fields, *fields)[:2]
    best: dict[tuple[Any, Any], Trial] = {}
    for trial in trials:
        best.setdefault((trial.point[across], trial.point[up]), trial)
    columns, rows = _ordered(key[0] for key in best), _ordered(key[1] for key in best)
    if across == up or len(columns) * len(rows) > MAX_CELLS_PER_TRIAL * len(best):
        _draw_points(best, across, up, path)
        return
    grid = [[_value(best.get((column, row))) for column in columns] for row in rows]
    figure = _figure(1.5 * len(columns) + 3, 1.0 * len(rows) + 2)
    axes = figure.subplots()
    figure.colorbar(axes.imshow(grid, origin="lower", cmap="viridis_r"), label=LABEL)
    axes.set_xticks(range(len(columns)), [value_text(column) for column in columns])
    axes.set_yticks(range(len(rows)), [value_text(row) for row in rows])
    axes.set_xlabel(short_name(across))
    axes.set_ylabel(short_name(up))
    for (y, row), (x, column) in itertools.product(enumerate(rows), enumerate(columns)):
        if there := best.get((column, row)):
            text = f"{there.metrics[METRIC]:.4f}"
            text += f"\nat step {there.step:,}" if there.status == TrialStatus.STOPPED else ""
            axes.text(x, y, text, ha="center", va="center", color="white", bbox=BOX)
    figure.savefig(path, dpi=120)


def _draw_points(best: Mapping[tuple[Any, Any], Trial], across: str, up: str, path: Path) -> None:
    figure = _figure(7, 5)
    axes = figure.subplots()
    trials = list(best.values())
    values = [trial.metrics[METRIC] for trial in trials]
    heights = (values, None) if across == up else _scale([trial.point[up] for trial in trials])
    places = _scale([trial.point[across] for trial in trials])
    points = axes.scatter(places[0], heights[0], c=values, cmap="viridis_r", s=60, edgecolors="black", linewidths=0.5)
    figure.colorbar(points, label=LABEL)
    for axis, (_, ticks), label in (
        (axes.xaxis, places, short_name(across)),
        (axes.yaxis, heights, LABEL if across == up else short_name(up)),
    ):
        axis.set_label_text(label)
        if ticks:
            axis.set_ticks(list(ticks), list(ticks.values()))
    figure.savefig(path, dpi=120)


def draw_parallel(trials: Sequence[Trial], path: Path) -> None:
    """Parallel coordinates (Inselberg 1985): an upright axis for each field and for the result, a line for each trial.

    Trials that were stopped early are dashed.
    """
    from matplotlib import colormaps

    fields = list(trials[0].point)
    scales = [_scale([trial.point[field] for trial in trials]) for field in fields]
    values = [trial.metrics[METRIC] for trial in trials]
    low, high = min(values), max(values)
    columns = [_unit(numbers) for numbers, _ in scales] + [_unit(values)]
    figure = _figure(2.2 * len(columns) + 1, 5)
    axes = figure.subplots()
    for index in reversed(range(len(trials))):  # the best on top
        share = (values[index] - low) / (high - low) if high > low else 0.0
        style = "--" if trials[index].status == TrialStatus.STOPPED else "-"
        heights = [column[index] for column in columns]
        axes.plot(range(len(columns)), heights, style, color=colormaps["viridis_r"](share), linewidth=1.5)
    for x, (field, (numbers, ticks)) in enumerate(zip(fields, scales, strict=True)):
        ends = ticks or {numbers[i]: value_text(trials[i].point[field]) for i in _ends(numbers)}
        for number, text in ends.items():
            axes.text(x, _place(number, numbers), f" {text}", va="center", fontsize=8)
    for end in (low, high):
        axes.text(len(fields), _place(end, values), f" {end:.4f}", va="center", fontsize=8)
    axes.set_xticks(range(len(columns)), [*map(short_name, fields), "bits per byte"])
    axes.set_yticks([])
    axes.grid(visible=True, axis="x")
    axes.margins(x=0.1)
    figure.savefig(path, dpi=120)


def draw_curves(curves: Mapping[str, tuple[Sequence[int], Sequence[float]]], path: Path) -> None:
    """Bits per byte over the steps of each trial, by its name, the best first."""
    figure = _figure(9, 5)
    axes = figure.subplots()
    for name, (steps, values) in curves.items():
        axes.plot(steps, values, "o-", label=name, linewidth=1.2, markersize=3)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(LABEL)
    axes.grid(visible=True, alpha=0.3)
    if len(curves) <= 16:
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _value(trial: Trial | None) -> float:
    return trial.metrics[METRIC] if trial else math.nan


def _ordered(values: Iterable[Any]) -> list[Any]:
    found = list(dict.fromkeys(values))
    return sorted(found) if all(_is_number(value) for value in found) else found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _scale(values: Sequence[Any]) -> tuple[list[float], dict[float, str] | None]:
    """Numbers to draw, and the texts of their ticks where they are not plain numbers: of words, or of logarithms."""
    if not all(_is_number(value) for value in values):
        words = list(dict.fromkeys(values))
        return [float(words.index(value)) for value in values], {float(i): str(word) for i, word in enumerate(words)}
    low, high = min(values), max(values)
    if low > 0 and high / low >= LOG_RATIO:
        return [math.log10(value) for value in values], {math.log10(end): value_text(end) for end in (low, high)}
    return [float(value) for value in values], None


def _ends(numbers: Sequence[float]) -> tuple[int, int]:
    return numbers.index(min(numbers)), numbers.index(max(numbers))


def _unit(numbers: Sequence[float]) -> list[float]:
    return [_place(number, numbers) for number in numbers]


def _place(number: float, numbers: Sequence[float]) -> float:
    low, high = min(numbers), max(numbers)
    return (number - low) / (high - low) if high > low else 0.5
