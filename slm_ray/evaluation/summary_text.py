"""A measurement for a person on a terminal.

In: the object that `evaluate.py --json` prints. Out: lines of text.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from slm_ray.errors import visible, visible_lines

_WAYS = {
    "stories": "each story after its own beginning",
    "windows": "windows of the stream of tokens, cut anywhere",
}


def measurement_text(result: Mapping[str, Any]) -> str:
    """The numbers of one measurement and of the comparison in it, as lines."""
    lines = [
        f"{result['model']} on {result['stories']:,} {result['split']} stories "
        f"({result['tokens']:,} tokens, {result['bytes']:,} bytes), {result['backend']}",
        f"  measure        {_WAYS[result['measure']]}; context {result['seq_len']}, stride {result['stride']}",
        f"  bits per byte  {with_error(result, 'bits_per_byte')}",
        f"  loss           {with_error(result, 'loss')} nats a token",
        f"  perplexity     {result['perplexity']:.4f} a token",
    ]
    if "borders" in result:
        lines.append(f"  tokens         the model's own; {visible(result['borders'])}")
    if result.get("by_position"):
        lines += ["", *_table("place in story", result["by_position"], ("tokens", "loss"))]
        lines += ["", *_table("tokens of story", result["by_length"], ("stories", "tokens", "loss", "bits_per_byte"))]
    if result.get("by_data_set"):
        lines += ["", *_by_data_set(result["by_data_set"])]
    if "writing" in result:
        lines += ["", *_writing(result["writing"])]
    if "against" in result:
        lines += ["", *_comparison(result["model"], result["against"])]
    return visible_lines("\n".join(lines))  # a stranger's model may have any name


def with_error(result: Mapping[str, Any], name: str) -> str:
    """`0.7462 ± 0.0031`, where a standard error is known."""
    error = result.get(f"{name}_standard_error")
    return f"{result[name]:.4f}" + (f" ± {error:.4f} (standard error, by story)" if error is not None else "")


def _table(head: str, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> list[str]:
    lines = [f"  {head:>16}" + "".join(f"{column.replace('_', ' '):>15}" for column in columns)]
    for row in rows:
        span = f"{row['from']:,} to {row['to']:,}" if row["from"] != row["to"] else f"{row['from']:,}"
        cells = (f"{row[name]:,}" if isinstance(row[name], int) else f"{row[name]:.4f}" for name in columns)
        lines.append(f"  {span:>16}" + "".join(f"{cell:>15}" for cell in cells))
    return lines


def _by_data_set(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    width = max(16, *(len(row["data_set"]) for row in rows))
    lines = [f"  {'data set':>{width}}{'fingerprint':>15}{'stories':>15}{'loss':>15}{'bits per byte':>15}"]
    for row in rows:
        figures = f"{row['stories']:>15,}{row['loss']:>15.4f}{row['bits_per_byte']:>15.4f}"
        lines.append(f"  {row['data_set']:>{width}}{row['fingerprint'][:12]:>15}{figures}")
    return lines


def _comparison(model: str, against: Mapping[str, Any]) -> list[str]:
    paired = against["bits_per_byte_difference"]
    lines = [
        f"{against['model']} on the same stories",
        f"  bits per byte  {with_error(against, 'bits_per_byte')}",
    ]
    if paired["standard_error"] is None:
        return [*lines, f"  {model} less it  {paired['mean']:+.5f} bits per byte (one story: no interval)"]
    verdict = "no difference beyond doubt"
    if paired["high"] < 0:
        verdict = f"{model} is better"
    elif paired["low"] > 0:
        verdict = f"{against['model']} is better"
    return [
        *lines,
        f"  {model} less it  {paired['mean']:+.5f} ± {paired['standard_error']:.5f} bits per byte, 95 % interval "
        f"{paired['low']:+.5f} to {paired['high']:+.5f}: {verdict}",
    ]


def _writing(writing: Mapping[str, Any]) -> list[str]:
    """The scores of what the model wrote, and of the held-out stories as they really go on."""
    lines = [f"  {'written stories':>26}{'the model':>15}{'own endings':>15}"]
    for name, value in writing["scores"].items():
        if isinstance(value, int | float):
            own = writing["own_endings"][name]
            lines.append(f"  {name.replace('_', ' '):>26}{_number(value):>15}{_number(own):>15}")
    return lines


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
