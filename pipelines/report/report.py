"""The report of a data set: lengths, Zipf's law, what was rejected, and stories with their token borders.

In: a manifest and the merged counters of all ranges. Out: `report/report.html`, one page with its figures inside,
and the same figures as PNG files. Made from counters alone, so it costs the same for any number of stories; the same
numbers give the same bytes.
"""

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np

from pipelines.report import figures, markup
from pipelines.report.markup import Code, Table
from pipelines.report.measures import RARE, fit_zipf, mean, percentile, share_within, suggested_seq_len
from slm_ray.dataset.licences import UNKNOWN, source_licence
from slm_ray.dataset.manifest import REJECTED, SPLITS, Manifest, Split
from slm_ray.preparation.summary import DataSummary, Sample
from slm_ray.storage import StoragePath, make_folder
from slm_ray.tokenization.tokenizer import Tokenizer

N_FREQUENT = 10  # words and tokens listed
N_FILES = 20  # sources listed
Values = dict[str, object]
"""What a part of the template `page.html` shows, by name."""


def write(folder: StoragePath, manifest: Manifest, found: DataSummary, tokenizer: Tokenizer) -> None:
    """Write the page and its figures into `folder`."""
    make_folder(folder)
    pictures = figures.draw_all(found)
    for name, content in pictures.items():
        (folder / f"{name}.png").write_bytes(content)
    page = markup.render(
        _header(manifest, found)
        | _fates(found)
        | _lengths(found)
        | _words(found)
        | _tokens(found, tokenizer)
        | _stories(found.samples, tokenizer)
        | _origin(manifest)
        | {"pictures": {name: base64.b64encode(content).decode("ascii") for name, content in pictures.items()}}
    )
    (folder / "report.html").write_bytes(page.encode("utf-8"))


def _header(manifest: Manifest, found: DataSummary) -> Values:
    """Title, the numbers of first interest, and the splits."""
    n_tokens = sum(split.tokens for split in manifest.splits.values())
    n_bytes = sum(split.bytes for split in manifest.splits.values())
    used = int(np.count_nonzero(found.token_counts))
    vocab_size = manifest.tokenizer["vocab_size"]
    tiles = [
        (found.kept, f"stories kept, {found.kept / max(1, found.read):.1%} of those read"),
        (n_tokens, "tokens, end-of-text tokens included"),
        (f"{n_bytes / 1e6:,.1f} MB", "of cleaned text"),
        (f"{n_bytes / max(1, n_tokens):.2f}", "bytes a token"),
        (f"{used / vocab_size:.1%}", f"of {vocab_size:,} tokens used"),
        (suggested_seq_len(found.tokens), "tokens: the sequence length suggested"),
    ]
    rows = [_split_row(name, manifest.splits[name]) for name in SPLITS]
    return {
        "title": _title(manifest),
        "fingerprint": manifest.fingerprint,
        "tiles": tiles,
        "splits": Table(["split", "stories", "tokens", "bytes of text", "bytes a token", "shards"], rows),
    }


def _title(manifest: Manifest) -> str:
    source = manifest.source
    if source["used"] != "files":
        return str(source["used"])
    names = [file["name"] for file in source["files"]]
    return ", ".join(names[:2]) + (f" and {len(names) - 2:,} more" if len(names) > 2 else "")


def _split_row(name: str, split: Split) -> tuple[object, ...]:
    per_token = f"{split.bytes / split.tokens:.3f}" if split.tokens else "-"
    return (name, split.rows, split.tokens, split.bytes, per_token, len(split.shards))


def _fates(found: DataSummary) -> Values:
    """The account, and examples of each reason."""
    reasons = sorted(found.reasons.items(), key=lambda item: (-item[1], item[0]))
    counts = [("kept", found.kept), *reasons, ("read", found.read)]
    return {
        "account": Table(
            ["", "stories", "share"], [(name, count, f"{count / max(1, found.read):.2%}") for name, count in counts]
        ),
        "examples": [
            Table([reason, "begins with"], [(Code(id_), found.evidence[id_]) for id_ in found.examples[reason]])
            for reason, _ in reasons
        ],
        "rejected_folder": REJECTED,
    }


def _lengths(found: DataSummary) -> Values:
    """Three units, and the sequence length that follows."""
    units = {"characters": found.chars, "words": found.words, "tokens": found.tokens}
    rows = [
        (unit, f"{mean(lengths):,.1f}", percentile(lengths, 0.5), percentile(lengths, 0.95), max(lengths, default=0))
        for unit, lengths in units.items()
    ]
    seq_len = suggested_seq_len(found.tokens)
    return {
        "lengths": Table(["per story", "mean", "median", "95th percentile", "longest"], rows),
        "seq_len": seq_len,
        "p95_tokens": percentile(found.tokens, 0.95),
        "fits": share_within(found.tokens, seq_len),
        "fits_half": share_within(found.tokens, seq_len // 2),
    }


def _words(found: DataSummary) -> Values:
    n_words = sum(found.word_counts.values())
    counts = figures.falling(np.fromiter(found.word_counts.values(), np.int64, len(found.word_counts)))
    frequent = sorted(found.word_counts.items(), key=lambda item: (-item[1], item[0]))[:N_FREQUENT]
    rows = [(Code(word), count, f"{count / n_words:.2%}") for word, count in frequent]
    return {
        "n_words": n_words,
        "n_distinct": len(counts),
        "seen_once": float(np.count_nonzero(counts == 1) / max(1, len(counts))),
        "zipf": fit_zipf(counts),
        "frequent_words": Table(["most frequent words", "occurrences", "share"], rows),
    }


def _tokens(found: DataSummary, tokenizer: Tokenizer) -> Values:
    counts = found.token_counts
    total = int(counts.sum())
    frequent = np.lexsort((np.arange(len(counts)), -counts))[:N_FREQUENT].tolist()
    rows = [
        (Code(_marked(piece)), token, int(counts[token]), f"{counts[token] / max(1, total):.2%}")
        for token, piece in zip(frequent, tokenizer.pieces(frequent), strict=True)
        if counts[token]
    ]
    return {
        "vocab_size": len(counts),
        "n_used": int(np.count_nonzero(counts)),
        "n_rare": int(np.count_nonzero((counts > 0) & (counts < RARE))),
        "rare": RARE,
        "frequent_tokens": Table(["most frequent tokens", "id", "occurrences", "share"], rows),
    }


def _stories(samples: list[Sample], tokenizer: Tokenizer) -> Values:
    """Training stories as the model sees them."""
    stories = [
        {
            "story_id": sample.story_id,
            "n_tokens": sample.n_tokens,
            "pieces": list(zip(sample.tokens, tokenizer.pieces(sample.tokens), strict=True)),
            "left_out": sample.n_tokens - len(sample.tokens),
        }
        for sample in samples
    ]
    return {"stories": stories, "n_stories": _n_stories(len(samples)), "eos_id": tokenizer.eos_id}


def _origin(manifest: Manifest) -> Values:
    """Source, parameters and tokenizer: all that decides about the bytes."""
    source = manifest.source
    files = [(file["name"], file["rows"], file["split"] or "", Code(file["sha256"])) for file in source["files"]]
    facts: list[tuple[str, object]] = [
        ("source asked for", source["requested"]),
        ("source used", source["used"]),
        *((name, source[name]) for name in ("why", "revision") if source[name]),
        ("licence of the stories", source_licence(source) or UNKNOWN),
        ("digest of the source", Code(source["digest"])),
        ("digest of the tokenizer", Code(manifest.tokenizer["sha256"])),
        ("fingerprint of the data set", Code(manifest.fingerprint)),
    ]
    parameters = [(name.replace("_", " "), _plain(value)) for name, value in sorted(manifest.parameters.items())]
    return {
        "facts": Table(["", ""], facts),
        "inputs": Table(["file", "stories", "split", "sha256"], files[:N_FILES]),
        "inputs_left_out": max(0, len(files) - N_FILES),
        "parameters": Table(["parameter", "value"], parameters),
    }


def _plain(value: Any) -> object:
    """A parameter's value in words: nested ones as `name value`, yes and no."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{name.replace('_', ' ')} {_plain(inner)}" for name, inner in sorted(value.items()))
    return "-" if value is None else str(value)


def _n_stories(count: int) -> str:
    words = ("No story", "One story", "Two stories", "Three stories", "Four stories", "Five stories")
    return words[count] if count < len(words) else f"{count} stories"


def _marked(piece: str) -> str:
    return piece.replace(" ", "␣")
