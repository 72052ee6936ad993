"""What a sweep found: a table and a heat map.

In: the finished trials, best first. Out: `results.csv` and `heatmap.png` in the sweep's folder and at the tracker.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

from slm_ray.tracking.tracker import Tracker

METRIC = "val_bits_per_byte"


@dataclasses.dataclass(frozen=True)
class Trial:
    """One finished point of the grid."""

    lr: float
    d_ff: int
    metrics: dict[str, float]  # of its best checkpoint
    run_id: str


def keep_results(trials: Sequence[Trial], folder: Path, parent: Tracker) -> None:
    """Table and heat map, in the sweep's folder and as artifacts of its run."""
    rows = ["lr,d_ff,step,val_loss,val_bits_per_byte,run_id"]
    for trial in trials:
        m = trial.metrics
        rows.append(f"{trial.lr:g},{trial.d_ff},{int(m['step'])},{m['val_loss']:.6f},{m[METRIC]:.6f},{trial.run_id}")
    (folder / "results.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    draw_heat_map(trials, folder / "heatmap.png")
    for name in ("results.csv", "heatmap.png"):
        parent.log_file(folder / name)
    parent.log_metrics({f"best_{METRIC}": trials[0].metrics[METRIC]}, 0)


def format_table(trials: Iterable[Trial]) -> str:
    """The trials as lines of text."""
    lines = [f"{'lr':>10} {'d_ff':>6} {'nats':>8} {'bits/byte':>10}"]
    for trial in trials:
        lines.append(
            f"{trial.lr:>10g} {trial.d_ff:>6} {trial.metrics['val_loss']:>8.4f} {trial.metrics[METRIC]:>10.4f}"
        )
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
