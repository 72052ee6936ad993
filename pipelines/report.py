"""The picture of a data set: lengths, Zipf's law, what was rejected, and stories with their token borders.

In: a manifest and the merged counters of all ranges. Out: `report/report.html`, one page with its pictures inside,
and the same pictures as PNG files. Made from counters alone, so it costs the same for any number of stories.
"""

import base64
import html
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slm_ray.shards import SPLITS, Manifest
from slm_ray.summary import DataSummary, Sample, percentile

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, ACCENT = "#2b2d42", "#d9822b"
DPI = 110

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #2b2d42; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem } h2 { font-size: 1.15rem; margin-top: 2rem }
table { border-collapse: collapse } td, th { padding: .2rem .9rem; text-align: right; border-bottom: 1px solid #ddd }
td:first-child, th:first-child { text-align: left; padding-left: 0 }
img { max-width: 100% } code { font-size: .85em; overflow-wrap: anywhere }
.story span { border-radius: 3px } .story span:nth-child(odd) { background: #fdecd8 }
.story span:nth-child(even) { background: #e3eef7 } .story { white-space: pre-wrap; line-height: 1.7 }
"""


def write(folder: Path, manifest: Manifest, found: DataSummary) -> None:
    """Write the page and its pictures into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {
        "words": _picture(lambda axes: _draw_lengths(axes, found.words, "words")),
        "tokens": _picture(lambda axes: _draw_lengths(axes, found.tokens, "tokens")),
        "zipf": _picture(lambda axes: _draw_zipf(axes, found.token_counts)),
    }
    for name, content in pictures.items():
        (folder / f"{name}.png").write_bytes(content)
    (folder / "report.html").write_text(_page(manifest, found, pictures), encoding="utf-8")


def _picture(draw: Callable[["Axes"], None]) -> bytes:
    """A PNG, drawn without a display; the same bytes for the same numbers."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    draw(axes)
    axes.spines[["top", "right"]].set_visible(False)
    target = io.BytesIO()
    figure.savefig(target, format="png", metadata={"Software": None})
    return target.getvalue()


def _draw_lengths(axes: "Axes", histogram: Mapping[int, int], unit: str) -> None:
    """How long the stories are, with the median and the 95th percentile."""
    lengths = np.array(sorted(histogram))
    counts = np.array([histogram[length] for length in lengths.tolist()])
    median, p95 = percentile(histogram, 0.5), percentile(histogram, 0.95)
    shown = max(10, round(1.6 * p95))
    axes.hist(lengths, bins=min(60, shown), range=(0, shown), weights=counts, color=INK, alpha=0.8)
    for value, name in ((median, "median"), (p95, "95th percentile")):
        axes.axvline(value, color=ACCENT, linestyle="-" if name == "median" else "--", label=f"{name} {value}")
    beyond = int(counts[lengths > shown].sum())
    axes.set(xlabel=f"{unit} per story" + (f" ({beyond:,} longer ones not shown)" if beyond else ""))
    axes.set(ylabel="stories")
    axes.legend(frameon=False)


def _draw_zipf(axes: "Axes", token_counts: np.ndarray[Any, Any]) -> None:
    """Frequency against rank: a near straight line on two logarithmic axes is Zipf's law."""
    counts = np.sort(token_counts[token_counts > 0])[::-1]
    axes.loglog(np.arange(1, len(counts) + 1), counts, color=INK, linewidth=2)
    axes.set(xlabel="rank of the token", ylabel="occurrences")
    axes.grid(alpha=0.2)


def _page(manifest: Manifest, found: DataSummary, pictures: Mapping[str, bytes]) -> str:
    used = int(np.count_nonzero(found.token_counts))
    size = manifest.tokenizer["vocab_size"]
    median, p95 = percentile(found.tokens, 0.5), percentile(found.tokens, 0.95)
    sections = [
        f"<h1>{html.escape(str(manifest.source['used']))}: {found.kept:,} stories</h1>",
        f"<p>Fingerprint <code>{manifest.fingerprint}</code></p>",
        "<h2>Splits</h2>" + _splits(manifest),
        "<h2>What became of the stories</h2>" + _fates(found),
        "<h2>Length</h2>" + _image(pictures["words"], "Stories by number of words"),
        _image(pictures["tokens"], "Stories by number of tokens"),
        f"<p>Half of the stories have at most {median:,} tokens, 95 % at most {p95:,}, end mark included.</p>",
        "<h2>Tokens</h2>" + _image(pictures["zipf"], "Token frequency by rank"),
        f"<p>{used:,} of {size:,} entries of the vocabulary are used.</p>",
        "<h2>Five stories as tokens</h2>" + "".join(_story(sample) for sample in found.samples),
        "<h2>Parameters</h2>" + _table(["parameter", "value"], sorted(manifest.parameters.items())),
    ]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Data set report</title>'
        f"<style>{STYLE}</style></head>\n<body>\n" + "\n".join(sections) + "\n</body></html>\n"
    )


def _splits(manifest: Manifest) -> str:
    rows = []
    for name in SPLITS:
        split = manifest.splits[name]
        per_token = f"{split.bytes / split.tokens:.2f}" if split.tokens else "-"
        cells = (f"{split.rows:,}", f"{split.tokens:,}", f"{split.bytes:,}", per_token, len(split.shards))
        rows.append((name, *cells))
    return _table(["split", "stories", "tokens", "bytes of text", "bytes a token", "shards"], rows)


def _fates(found: DataSummary) -> str:
    rows = [("kept", f"{found.kept:,}", "")]
    for reason, count in sorted(found.reasons.items(), key=lambda pair: (-pair[1], pair[0])):
        rows.append((reason, f"{count:,}", ", ".join(found.examples[reason])))
    return _table(["", "stories", "for example"], [*rows, ("read", f"{found.read:,}", "")])


def _story(sample: Sample) -> str:
    """Each token in its own shade."""
    pieces = "".join(f"<span>{html.escape(piece)}</span>" for piece in sample.pieces)
    return f'<p><code>{html.escape(sample.story_id)}</code></p><p class="story">{pieces}</p>'


def _table(head: list[str], rows: list[tuple[Any, ...]]) -> str:
    lines = ["".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) for row in rows]
    heads = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    return f"<table><tr>{heads}</tr>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _image(content: bytes, text: str) -> str:
    return f'<img alt="{text}" src="data:image/png;base64,{base64.b64encode(content).decode()}">'
