"""Where in the stories the loss lies, as a picture: by position and by length of story.

In: the tables of one or two measurements. Out: a PNG, the same bytes for the same numbers. Drawn on white, without a
display, whatever settings of matplotlib the user has.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slm_ray.errors import UserError
from slm_ray.evaluation.losses import Row
from slm_ray.evaluation.measurement import Measurement

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, COLORS, GRID = "#33384a", ("#5b84b1", "#c8641b"), "#e3e6ec"
SIZE_INCHES = (9.6, 3.6)
DPI = 150
STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so letters are the same everywhere
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": GRID,
    "legend.frameon": False,
}
Named = tuple[str, Sequence[Row]]


def loss_picture(by_position: Sequence[Named], by_length: Sequence[Named]) -> bytes:
    """A PNG of the tables of some models, each with its name: nats by position, bits per byte by length of story."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(STYLE)
        figure = Figure(figsize=SIZE_INCHES, dpi=DPI)
        FigureCanvasAgg(figure)
        figure.subplots_adjust(left=0.07, right=0.98, top=0.95, bottom=0.15, wspace=0.2)
        left, right = figure.subplots(1, 2)
        _draw(left, by_position, "loss", "place of the token in its story", "nats a token")
        _draw(right, by_length, "bits_per_byte", "tokens of the story", "bits per byte")
        target = io.BytesIO()
        figure.savefig(target, format="png", metadata={"Software": None})
    return target.getvalue()


def _draw(axes: "Axes", tables: Sequence[Named], value: str, x_label: str, y_label: str) -> None:
    """A step for each row; places count from 1 here, since the axis is logarithmic."""
    for color, (name, rows) in zip(COLORS, tables):
        shift = 1 if value == "loss" else 0
        starts = [max(1, int(row["from"] or 0) + shift) for row in rows]
        heights = [float(row[value] or 0) for row in rows]
        end = int(rows[-1]["to"] or 0) + shift + 1
        axes.stairs(heights, [*starts, max(end, starts[-1] + 1)], color=color, linewidth=2, label=name, baseline=None)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda number, _: f"{number:g}")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(axis="y")
    if len(tables) > 1:
        axes.legend()


def write_picture(path: str, first: Measurement, second: Measurement | None = None) -> None:
    """Write the picture of one measurement, or of two beside each other.

    Raises:
        UserError: the file cannot be written.
    """
    measured = [one for one in (first, second) if one is not None and one.stories is not None]
    content = loss_picture(
        [(one.model, one.tables()["by_position"]) for one in measured],
        [(one.model, one.tables()["by_length"]) for one in measured],
    )
    try:
        Path(path).write_bytes(content)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
