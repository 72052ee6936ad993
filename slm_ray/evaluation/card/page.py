"""A card for people: Markdown and HTML of the same sections.

In: the content of a card. Out: text. No value acts as markup or on a terminal; the page loads nothing from outside.
"""

import base64
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from slm_ray.errors import visible
from slm_ray.evaluation.card.content import DIGEST
from slm_ray.evaluation.pictures import loss_picture

SHOWN_STORIES = 5
LOSSES = ("loss", "bits_per_byte")
_MARKUP = re.compile(r"([\\`*_{}\[\]<>#|~&])")
_NUMBER = re.compile(r"[0-9][0-9,.]*( ± [0-9.]+)?%?|-")


@dataclass(frozen=True)
class Section:
    """A heading with text, a table, stories; any of them may be missing."""

    title: str
    notes: Sequence[str] = ()
    head: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    stories: Sequence[tuple[str, str]] = ()
    """Beginning and what the model wrote after it."""
    has_picture: bool = False
    command: str = ""
    is_number: list[bool] = field(init=False)
    """By column, whether all its cells are numbers."""

    def __post_init__(self) -> None:
        columns = [[row[at] for row in self.rows] for at in range(len(self.head))]
        found = [bool(cells) and all(_NUMBER.fullmatch(cell) for cell in cells) for cells in columns]
        object.__setattr__(self, "is_number", found)


def markdown(card: Mapping[str, Any]) -> str:
    """The card as Markdown."""
    lines = [f"# Card of {_plain(card['model']['name'])}", ""]
    for section in sections(card):
        lines += [f"## {section.title}", ""]
        for note in section.notes:
            lines += [_plain(note), ""]
        if section.has_picture:
            lines += ["![Loss by place in the story and by length of story](loss.png)", ""]
        if section.rows:
            lines += [_row(section.head), _row(["---:" if is_number else "---" for is_number in section.is_number])]
            lines += [_row(map(_plain, row)) for row in section.rows]
            lines += [""]
        for beginning, text in section.stories:
            lines += [f"> **{_plain(beginning)}**{_plain(text)}", ""]
        if section.command:
            lines += ["```sh", section.command, "```", ""]
    return "\n".join(lines)


def html(card: Mapping[str, Any]) -> str:
    """The card as one HTML page, its picture inside."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=lambda value: _visible(str(value)),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    values = {
        "title": f"Card of {card['model']['name']}",
        "sections": sections(card),
        "picture": base64.b64encode(picture(card)).decode("ascii"),
    }
    return environment.get_template("page.html").render(values)


def picture(card: Mapping[str, Any]) -> bytes:
    """PNG of the loss by position and by length of story."""
    name = card["model"]["name"]
    return loss_picture([(name, card["loss"]["by_position"])], [(name, card["loss"]["by_length"])])


def sections(card: Mapping[str, Any]) -> list[Section]:
    """What the card says, in the order in which one asks."""
    return [_result(card), _model(card), *_tables(card), *_writing(card), _published(card), _how()]


def _result(card: Mapping[str, Any]) -> Section:
    loss, data = card["loss"], card["data"]
    rows = [
        ("bits per byte", _with_error(loss, "bits_per_byte")),
        ("loss, nats a token", _with_error(loss, "loss")),
        ("perplexity a token", f"{loss['perplexity']:.4f}"),
    ]
    note = (
        f"On all {data['stories']:,} {data['split']} stories ({data['tokens']:,} tokens, {data['bytes']:,} bytes): "
        f"each after its own beginning, context {loss['seq_len']} tokens, longer stories in windows with a stride of "
        f"{loss['stride']}, every token once. Behind ±: the standard error, clustered by story."
    )
    return Section("Loss", [note], ["measure", "value"], rows)


def _with_error(values: Mapping[str, Any], name: str) -> str:
    error = values[f"{name}_standard_error"]
    return f"{values[name]:.4f}" + (f" ± {error:.4f}" if error is not None else "")


def _model(card: Mapping[str, Any]) -> Section:
    model, data, made = card["model"], card["data"], card["made_with"]
    rows = [
        ("parameters", f"{model['parameters']:,}"),
        ("optimizer steps", f"{model['step']:,}"),
        ("shape", ", ".join(f"{name} {value}" for name, value in model["config"].items())),
        ("sha256 of the weights", model["weights_sha256"]),
        ("sha256 of the tokenizer", model["tokenizer_sha256"]),
        ("trained on, from step", "; ".join(f"{data_set} from {step}" for data_set, step in model["trained_on"])),
        *(
            (f"mixture {mark[:12]}", "; ".join(f"{weight:.2%} of {data_set}" for data_set, weight in shares))
            for mark, shares in model.get("mixtures", {}).items()
        ),
        ("measured on data set", data["fingerprint"]),
        *([("licence of its stories", data["licence"])] if "licence" in data else []),  # cards of before have none
        ("training stories there", f"{data['training_stories']:,} ({data['training_tokens']:,} tokens)"),
        ("computed on", ", ".join(f"{name} {value}" for name, value in made["machine"].items())),
        ("sha256 of this card", card[DIGEST]),
    ]
    return Section("Model and data", (), ["", ""], rows)


def _tables(card: Mapping[str, Any]) -> Iterator[Section]:
    loss = card["loss"]
    by_position = [(_span(row), f"{row['tokens']:,}", f"{row['loss']:.4f}") for row in loss["by_position"]]
    by_length = [
        (_span(row), f"{row['stories']:,}", f"{row['tokens']:,}", f"{row['loss']:.4f}", f"{row['bits_per_byte']:.4f}")
        for row in loss["by_length"]
    ]
    head = ["place in the story", "tokens", "nats a token"]
    yield Section("Loss by place in the story", ["Place 0 is the first token."], head, by_position, has_picture=True)
    head = ["tokens of the story", "stories", "tokens", "nats a token", "bits per byte"]
    yield Section("Loss by length of story", (), head, by_length)
    if "by_data_set" in loss:  # of a mixture
        head = ["data set", "stories", "tokens", "nats a token", "bits per byte"]
        by_data_set = [
            (row["fingerprint"], f"{row['stories']:,}", f"{row['tokens']:,}", *(f"{row[one]:.4f}" for one in LOSSES))
            for row in loss["by_data_set"]
        ]
        yield Section("Loss by data set", (), head, by_data_set)


def _span(row: Mapping[str, Any]) -> str:
    return f"{row['from']:,} to {row['to']:,}" if row["from"] != row["to"] else f"{row['from']:,}"


def _writing(card: Mapping[str, Any]) -> Iterator[Section]:
    writing = card["writing"]
    scores, own, way = writing["scores"], writing["own_endings"], writing["sampling"]
    rows = [
        (name.replace("_", " "), _cell(value), _cell(own[name]))
        for name, value in scores.items()
        if name not in ("longest_copy", "unknown_examples") and (value is not None or own[name] is not None)
    ]
    note = (
        f"The model went on with {card['made_with']['beginnings']} beginnings of {card['data']['split']} stories, or "
        f"as many as there are, and with a fixed list: {scores['stories']} stories, temperature {way['temperature']}, "
        f"top-k {way['top_k']}, at most {way['max_tokens']} tokens, fixed seeds. Own endings: how the held-out "
        "stories really go on. Shares are from 0 to 1; copied: word for word in a training story, 8 tokens and more."
    )
    notes = [note]
    if scores["longest_copy"]:
        notes.append(f"Longest copied span: “{scores['longest_copy'].strip()}”")
    if scores["unknown_examples"]:
        notes.append(f"Words of no training story: {', '.join(scores['unknown_examples'])}")
    yield Section("Written stories", notes, ["score", "the model", "own endings"], rows)
    shown = [(story["prompt"], story["text"]) for story in writing["stories"][:SHOWN_STORIES]]
    yield Section("Some of them", (), stories=shown)


def _cell(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def _published(card: Mapping[str, Any]) -> Section:
    rows = [
        (one["model"], one["parameters"], one["tokenizer"], str(one["context"]), str(one["loss"]), one["differs"])
        for one in card["published"]
    ]
    sources = sorted({one["source"] for one in card["published"]})
    head = ["model", "parameters", "tokenizer", "context", "nats a token", "what differs"]
    return Section("Published figures", [f"Source: {'; '.join(sources)}."], head, rows)


def _how() -> Section:
    note = (
        "card.json holds every number to the last digit, and the stories with their seeds. This computes it again from "
        "the model and the data, and says equal or which number is not:"
    )
    command = "python slm_ray/evaluate.py --model MODEL --data DATA --verify card.json"
    return Section("How to check it", [note], command=command)


def _row(cells: Sequence[str] | Iterator[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _plain(text: str) -> str:
    """Text that is no markup."""
    return _MARKUP.sub(r"\\\1", _visible(text))


def _visible(text: str) -> str:
    """Hidden characters are written out; a line break is a space."""
    return visible(text.replace("\r\n", " ").replace("\n", " "))
