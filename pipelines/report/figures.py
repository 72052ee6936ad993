"""The figures of the report: one PNG each, the same bytes for the same numbers.

In: a `DataSummary`. Out: the content of PNG files by name. Drawn on white for files and paper; the page turns them
dark by a filter. Narrow, so that their letters can be read on a phone.
"""

import contextlib
import importlib
import io
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pipelines.report.measures import RARE, fit_zipf, percentile, share_within, suggested_seq_len
from slm_ray.preparation.summary import DataSummary

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, BARS, ACCENT, GRID = "#33384a", "#5b84b1", "#c8641b", "#e3e6ec"
SIZE_INCHES = (5.2, 3.25)
DPI = 180
N_BARS = 60
STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so letters are the same everywhere
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": GRID,
    "legend.frameon": False,
}


def draw_all(found: DataSummary) -> dict[str, bytes]:
    """Every figure of the report by its name; `rejections` only where there are any."""
    word_counts = falling(np.fromiter(found.word_counts.values(), np.int64, len(found.word_counts)))
    figures: dict[str, Callable[[Axes], None]] = {
        "characters": lambda axes: _draw_lengths(axes, found.chars, "characters"),
        "words": lambda axes: _draw_lengths(axes, found.words, "words"),
        "tokens": lambda axes: _draw_lengths(axes, found.tokens, "tokens"),
        "sequence": lambda axes: _draw_fit(axes, found.tokens),
        "zipf": lambda axes: _draw_zipf(axes, word_counts),
        "vocabulary": lambda axes: _draw_vocabulary(axes, found.token_counts),
    }
    if found.reasons:
        figures["rejections"] = lambda axes: _draw_reasons(axes, found.reasons)
    return {name: _picture(draw) for name, draw in figures.items()}


def preload() -> None:
    """Import what draws, for a thread beside the work: it takes half a second, and the report comes last."""
    with contextlib.suppress(ImportError):  # `draw_all` says it
        for name in ("matplotlib.backends.backend_agg", "matplotlib.figure"):
            importlib.import_module(name)


def falling(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """What occurs at all, most frequent first."""
    return np.sort(counts[counts > 0])[::-1]


def _picture(draw: Callable[["Axes"], None]) -> bytes:
    """A PNG, drawn without a display, whatever settings of matplotlib the user has."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(STYLE)
        figure = Figure(figsize=SIZE_INCHES, dpi=DPI)
        FigureCanvasAgg(figure)
        figure.subplots_adjust(left=0.14, right=0.97, top=0.9, bottom=0.15)
        draw(figure.add_subplot())
        target = io.BytesIO()
        figure.savefig(target, format="png", metadata={"Software": None})
    return target.getvalue()


def _draw_lengths(axes: "Axes", histogram: Mapping[int, int], unit: str) -> None:
    """How long the stories are, with the median and the 95th percentile."""
    lengths = np.array(sorted(histogram))
    counts = np.array([histogram[length] for length in lengths.tolist()])
    median, p95 = percentile(histogram, 0.5), percentile(histogram, 0.95)
    width = max(1, -(-max(10, round(1.6 * p95)) // N_BARS))  # whole numbers, or bars would be comb-like
    shown = width * N_BARS
    axes.hist(lengths, bins=list(range(0, shown + width, width)), weights=counts, color=BARS)
    axes.axvline(median, color=ACCENT, linewidth=1.8, label=f"median {median:,}")
    axes.axvline(p95, color=ACCENT, linewidth=1.8, linestyle="--", label=f"95th percentile {p95:,}")
    beyond = int(counts[lengths >= shown + width].sum())
    _label(axes, f"{unit} per story" + (f" ({beyond:,} longer not shown)" if beyond else ""), "stories")
    axes.grid(axis="y")
    axes.set_xlim(0, shown)
    _legend(axes)


def _draw_fit(axes: "Axes", tokens: Mapping[int, int]) -> None:
    """The share of stories that a sequence of a given length holds, and the length suggested."""
    lengths = np.array(sorted(tokens))
    shares = np.cumsum([tokens[length] for length in lengths.tolist()]) / sum(tokens.values())
    suggested = suggested_seq_len(tokens)
    held = share_within(tokens, suggested)
    axes.axhline(95, color=GRID, linewidth=1.5)
    axes.step(lengths, 100 * shares, where="post", color=BARS, linewidth=2)
    axes.axvline(suggested, color=ACCENT, linewidth=1.8, label=f"{suggested:,} tokens hold {held:.1%}")
    axes.set_xscale("log", base=2)
    axes.set_xlim(max(8, int(lengths[0])) * 0.9, max(int(lengths[-1]), suggested) * 1.15)
    axes.set_ylim(0, 104)
    _label(axes, "sequence length in tokens", "% of stories that fit")
    _legend(axes)


def _draw_zipf(axes: "Axes", counts: npt.NDArray[np.int64]) -> None:
    """Occurrences of words by rank, and the fitted line."""
    axes.loglog(*_by_rank(counts), color=BARS, linewidth=2.2, label="words")
    fit = fit_zipf(counts)
    if fit is not None:
        label = f"slope {fit.slope:.2f}, ranks {fit.first:,} to {fit.last:,}".replace("-", "\N{MINUS SIGN}")
        ends = [fit.first, fit.last]
        axes.loglog(ends, [fit.count_at(rank) for rank in ends], color=ACCENT, linewidth=1.8, label=label)
        whole = [1, len(counts)]
        axes.loglog(whole, [fit.count_at(rank) for rank in whole], color=ACCENT, linewidth=0.9, linestyle=":")
    axes.set_ylim(bottom=0.7)
    _label(axes, "rank of the word", "occurrences")
    axes.grid()
    _legend(axes)


def _draw_vocabulary(axes: "Axes", token_counts: npt.NDArray[np.int64]) -> None:
    """Occurrences of tokens by rank, and where they become too rare to be learned."""
    counts = falling(token_counts)
    axes.loglog(*_by_rank(counts), color=BARS, linewidth=2.2, label=f"{len(counts):,} tokens used")
    rare = int(np.count_nonzero(counts < RARE))
    axes.axhline(RARE, color=ACCENT, linewidth=1.8, linestyle="--", label=f"{rare:,} occur less than {RARE} times")
    axes.set_ylim(bottom=0.7)
    _label(axes, "rank of the token", "occurrences")
    axes.grid()
    _legend(axes)


def _draw_reasons(axes: "Axes", reasons: Mapping[str, int]) -> None:
    """Rejected stories by reason, most frequent at the top."""
    ordered = sorted(reasons.items(), key=lambda item: (item[1], item[0]))
    bars = axes.barh([name.replace("_", " ") for name, _ in ordered], [count for _, count in ordered], color=BARS)
    axes.bar_label(bars, [f"{count:,}" for _, count in ordered], padding=4)
    axes.figure.subplots_adjust(left=0.3, right=0.95)
    axes.set_xlim(0, 1.18 * max(reasons.values()))
    _label(axes, "stories", "")


def _label(axes: "Axes", x: str, y: str) -> None:
    axes.set(xlabel=x, ylabel=y)
    axes.minorticks_off()  # on logarithmic axes they are most of the drawing time
    for axis in (axes.xaxis, axes.yaxis):
        if axis.get_label_text():
            axis.set_major_formatter(_compact)


def _legend(axes: "Axes") -> None:
    """Above the figure, where it hides nothing."""
    axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=2, borderaxespad=0.2, columnspacing=1.4)


def _compact(value: float, _: object) -> str:
    """Tick labels with thousands apart: 12000 is `12,000`, and 3000000 is `3 M`."""
    if value >= 1e6:
        return f"{value / 1e6:,g} M"
    return f"{value:,.0f}" if value == round(value) else f"{value:,g}"


def _by_rank(counts: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Ranks and counts, thinned evenly in the logarithm: a picture of 900 points across shows no more."""
    ranks = np.unique(np.geomspace(1, max(1, len(counts)), 900).round().astype(np.int64))
    ranks = ranks[ranks <= len(counts)]
    return ranks, counts[ranks - 1]
