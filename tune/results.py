"""What a sweep found: a table and a heat map.

In: what became of the trials, the best first. Out: `results.csv` and `heatmap.png` in the sweep's folder and at the
tracker. A trial that diverged or failed is a row too.
"""

import csv
import dataclasses
import io
import itertools
from collections.abc import Iterable, Sequence
from enum import StrEnum
from pathlib import Path

from slm_ray import storage
from slm_ray.tracking.tracker import Tracker

METRIC = "val_bits_per_byte"


class TrialStatus(StrEnum):
    """What became of a trial."""

    FINISHED = "finished"
    DIVERGED = "diverged"
    FAILED = "failed"


@dataclasses.dataclass(frozen=True)
class Trial:
    """One point of the grid, run."""

    lr: float
    d_ff: int
    metrics: dict[str, float]  # of its best checkpoint; empty unless it finished
    run_id: str
    status: TrialStatus = TrialStatus.FINISHED
    reason: str = ""  # why it did not finish
    step: int = 0  # at which it diverged or, as far as is known, failed


def ranked(trials: Iterable[Trial]) -> list[Trial]:
    """Those that finished by their bits per byte, then those that diverged, then those that failed."""
    order = list(TrialStatus)
    return sorted(trials, key=lambda trial: (order.index(trial.status), trial.metrics.get(METRIC, 0.0)))


def keep_results(trials: Sequence[Trial], folder: Path, parent: Tracker) -> None:
    """Table and, where a trial finished, heat map, in the sweep's folder and as artifacts of its run."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["lr", "d_ff", "step", "val_loss", METRIC, "run_id", "status", "reason"])
    for trial in trials:
        m = trial.metrics
        measures = [f"{m[name]:.6f}" if name in m else "" for name in ("val_loss", METRIC)]
        step = int(m.get("step", trial.step))
        table.writerow([f"{trial.lr:g}", trial.d_ff, step, *measures, trial.run_id, trial.status, trial.reason])
    storage.replace_file(folder / "results.csv", text.getvalue().encode())
    parent.log_file(folder / "results.csv")
    if finished := [trial for trial in trials if trial.status == TrialStatus.FINISHED]:
        draw_heat_map(finished, folder / "heatmap.png")
        parent.log_file(folder / "heatmap.png")
        parent.log_metrics({f"best_{METRIC}": finished[0].metrics[METRIC]}, 0)


def format_table(trials: Iterable[Trial]) -> str:
    """The trials as lines of text."""
    lines = [f"{'lr':>10} {'d_ff':>6} {'nats':>8} {'bits/byte':>10}"]
    for trial in trials:
        line = f"{trial.lr:>10g} {trial.d_ff:>6} "
        if trial.status == TrialStatus.FINISHED:
            lines.append(f"{line}{trial.metrics['val_loss']:>8.4f} {trial.metrics[METRIC]:>10.4f}")
        else:
            lines.append(f"{line}{trial.status:>8} at step {trial.step:,}: {trial.reason}")
    return "\n".join(lines)


def draw_heat_map(trials: Iterable[Trial], path: Path) -> None:
    """Bits per byte over learning rate (across) and FF width (up), as a PNG; a missing point stays blank."""
    from matplotlib.figure import Figure

    values = {(trial.lr, trial.d_ff): trial.metrics[METRIC] for trial in trials}
    rates, widths = sorted({lr for lr, _ in values}), sorted({d_ff for _, d_ff in values})
    grid = [[values.get((lr, d_ff), float("nan")) for lr in rates] for d_ff in widths]
    figure = Figure(figsize=(1.5 * len(rates) + 3, 1.0 * len(widths) + 2), layout="constrained")
    axes = figure.subplots()
    figure.colorbar(axes.imshow(grid, origin="lower", cmap="viridis_r"), label="validation bits per byte")
    axes.set_xticks(range(len(rates)), [f"{lr:g}" for lr in rates])
    axes.set_yticks(range(len(widths)), [str(d_ff) for d_ff in widths])
    axes.set_xlabel("learning rate")
    axes.set_ylabel("d_ff")
    box = {"facecolor": "black", "alpha": 0.6, "edgecolor": "none"}  # readable on every colour
    for (row, d_ff), (column, lr) in itertools.product(enumerate(widths), enumerate(rates)):
        if (lr, d_ff) in values:
            axes.text(column, row, f"{values[lr, d_ff]:.4f}", ha="center", va="center", color="white", bbox=box)
    figure.savefig(path, dpi=120)
