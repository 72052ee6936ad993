"""The picture of a data set: lengths, Zipf's law, what was rejected, and stories with their token borders.

In: a manifest and the merged counters of all ranges. Out: `report/report.html`, one page with its figures inside,
and the same figures as PNG files. Made from counters alone, so it costs the same for any number of stories; the same
numbers give the same bytes.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from pipelines.report import figures, markup
from pipelines.report.markup import Code
from pipelines.report.measures import RARE, fit_zipf, mean, percentile, share_within, suggested_seq_len
from slm_ray.dataset.manifest import REJECTED, SPLITS, Manifest, Split
from slm_ray.preparation.summary import DataSummary, Sample
from slm_ray.storage import StoragePath, make_folder
from slm_ray.tokenization.tokenizer import Tokenizer

N_FREQUENT = 10  # words and tokens listed
N_FILES = 20  # sources listed


def write(folder: StoragePath, manifest: Manifest, found: DataSummary, tokenizer: Tokenizer) -> None:
    """Write the page and its figures into `folder`."""
    make_folder(folder)
    pictures = figures.draw_all(found)
    for name, content in pictures.items():
        (folder / f"{name}.png").write_bytes(content)
    (folder / "report.html").write_bytes(_page(manifest, found, tokenizer, pictures).encode("utf-8"))


def _page(manifest: Manifest, found: DataSummary, tokenizer: Tokenizer, pictures: Mapping[str, bytes]) -> str:
    title = _title(manifest)
    sections = [
        _header(title, manifest, found),
        "<h2>Splits</h2>" + _splits(manifest),
        "<h2>What became of the stories</h2>" + _fates(found, pictures),
        "<h2>How long the stories are</h2>" + _lengths(found, pictures),
        "<h2>Words and Zipf’s law</h2>" + _words(found, pictures),
        "<h2>Tokens and the vocabulary</h2>" + _tokens(found, tokenizer, pictures),
        f"<h2>{_n_stories(len(found.samples))} as tokens</h2>" + _stories(found.samples, tokenizer),
        "<h2>Where it comes from</h2>" + _origin(manifest),
    ]
    return markup.document(f"Data set report: {title}", sections)


def _title(manifest: Manifest) -> str:
    source = manifest.source
    if source["used"] != "files":
        return str(source["used"])
    names = [file["name"] for file in source["files"]]
    return ", ".join(names[:2]) + (f" and {len(names) - 2:,} more" if len(names) > 2 else "")


def _header(title: str, manifest: Manifest, found: DataSummary) -> str:
    n_tokens = sum(split.tokens for split in manifest.splits.values())
    n_bytes = sum(split.bytes for split in manifest.splits.values())
    used = int(np.count_nonzero(found.token_counts))
    numbers = [
        (f"{found.kept:,}", f"stories kept, {found.kept / max(1, found.read):.1%} of those read"),
        (f"{n_tokens:,}", "tokens, end-of-text tokens included"),
        (f"{n_bytes / 1e6:,.1f} MB", "of cleaned text"),
        (f"{n_bytes / max(1, n_tokens):.2f}", "bytes a token"),
        (f"{used / manifest.tokenizer['vocab_size']:.1%}", f"of {manifest.tokenizer['vocab_size']:,} tokens used"),
        (f"{suggested_seq_len(found.tokens):,}", "tokens: the sequence length suggested"),
    ]
    return (
        f"<header><h1>{markup.text(title)}</h1>\n<p>Data set report. Fingerprint "
        f"{markup.code(manifest.fingerprint)}</p></header>\n" + markup.tiles(numbers)
    )


def _splits(manifest: Manifest) -> str:
    rows = [_split_row(name, manifest.splits[name]) for name in SPLITS]
    return markup.table(["split", "stories", "tokens", "bytes of text", "bytes a token", "shards"], rows)


def _split_row(name: str, split: Split) -> tuple[object, ...]:
    per_token = f"{split.bytes / split.tokens:.3f}" if split.tokens else "-"
    return (name, split.rows, split.tokens, split.bytes, per_token, len(split.shards))


def _fates(found: DataSummary, pictures: Mapping[str, bytes]) -> str:
    """The account, the figure where there is one, and examples of each reason."""
    reasons = sorted(found.reasons.items(), key=lambda item: (-item[1], item[0]))
    counts = [("kept", found.kept), *reasons, ("read", found.read)]
    account = markup.table(
        ["", "stories", "share"], [(name, count, f"{count / max(1, found.read):.2%}") for name, count in counts]
    )
    if not reasons:
        return account + '<p class="note">No story was a duplicate, and none was rejected.</p>'
    shown = markup.figure(pictures["rejections"], "Stories kept aside, by reason")
    note = f'<p class="note">All of them are in <code>{REJECTED}/</code>, with the beginning of their text.</p>'
    examples = "".join(
        markup.table([reason, "begins with"], [(Code(story_id), found.evidence[story_id]) for story_id in ids])
        for reason, ids in ((reason, found.examples[reason]) for reason, _ in reasons)
    )
    return (
        f'<div class="columns"><div>{account}</div>{shown}</div>'
        f'<h3>Examples</h3><div class="examples">{examples}</div>{note}'
    )


def _lengths(found: DataSummary, pictures: Mapping[str, bytes]) -> str:
    """Three units, and the sequence length that follows."""
    units = {"characters": found.chars, "words": found.words, "tokens": found.tokens}
    rows = [
        (unit, f"{mean(lengths):,.1f}", percentile(lengths, 0.5), percentile(lengths, 0.95), max(lengths, default=0))
        for unit, lengths in units.items()
    ]
    seq_len = suggested_seq_len(found.tokens)
    answer = (
        f"<strong>Suggested sequence length: {seq_len:,} tokens.</strong> It is the smallest of 64, 128, 256, 512, … "
        f"that holds the 95th percentile ({percentile(found.tokens, 0.95):,} tokens, end-of-text token included); "
        f"{share_within(found.tokens, seq_len):.1%} of the stories fit into it whole, and "
        f"{share_within(found.tokens, seq_len // 2):.1%} into {seq_len // 2:,}."
    )
    drawn = [markup.figure(pictures[unit], f"Stories by number of {unit}") for unit in units]
    drawn.append(markup.figure(pictures["sequence"], "Share of stories that fit, by sequence length"))
    return (
        markup.table(["per story", "mean", "median", "95th percentile", "longest"], rows)
        + f'<p class="answer">{answer}</p><div class="figures">{"".join(drawn)}</div>'
    )


def _words(found: DataSummary, pictures: Mapping[str, bytes]) -> str:
    n_words = sum(found.word_counts.values())
    counts = figures.falling(np.fromiter(found.word_counts.values(), np.int64, len(found.word_counts)))
    fit = fit_zipf(counts)
    law = "Too few different words to fit Zipf’s law."
    if fit is not None:
        law = (
            f"<strong>Fitted slope {fit.slope:.3f}</strong>: the count of a word falls with its rank to the power of "
            f"{fit.slope:.2f}; Zipf’s law says about -1. Least squares on the logarithms of rank and count, over "
            f"{fit.n_ranks} ranks spaced evenly in the logarithm from {fit.first:,} to {fit.last:,}."
        ).replace("-", "\N{MINUS SIGN}")
    once = np.count_nonzero(counts == 1) / max(1, len(counts))
    about = (
        f"{n_words:,} words, {len(counts):,} different ones, {once:.1%} of these seen once. "
        "A word is what stands between white space, in lower case, without the marks around it."
    )
    frequent = sorted(found.word_counts.items(), key=lambda item: (-item[1], item[0]))[:N_FREQUENT]
    rows = [(Code(word), count, f"{count / n_words:.2%}") for word, count in frequent]
    return (
        f'<p>{about}</p><p class="answer">{law}</p><div class="columns">'
        + markup.figure(pictures["zipf"], "Occurrences of words by rank, on logarithmic axes, with the fitted line")
        + markup.table(["most frequent words", "occurrences", "share"], rows)
        + "</div>"
    )


def _tokens(found: DataSummary, tokenizer: Tokenizer, pictures: Mapping[str, bytes]) -> str:
    counts = found.token_counts
    total, used = int(counts.sum()), int(np.count_nonzero(counts))
    rare = int(np.count_nonzero((counts > 0) & (counts < RARE)))
    about = (
        f"<strong>{used:,} of {len(counts):,} tokens of the vocabulary are used</strong> "
        f"({used / max(1, len(counts)):.1%}); {len(counts) - used:,} never occur, and {rare:,} occur less than "
        f"{RARE} times: a model will hardly learn these."
    )
    frequent = np.lexsort((np.arange(len(counts)), -counts))[:N_FREQUENT].tolist()
    rows = [
        (Code(_marked(piece)), token, int(counts[token]), f"{counts[token] / max(1, total):.2%}")
        for token, piece in zip(frequent, tokenizer.pieces(frequent), strict=True)
        if counts[token]
    ]
    return (
        f'<p class="answer">{about}</p><div class="columns">'
        + markup.figure(pictures["vocabulary"], "Occurrences of tokens by rank, on logarithmic axes")
        + markup.table(["most frequent tokens", "id", "occurrences", "share"], rows)
        + '</div><p class="note">␣ is a space, which belongs to the token after it.</p>'
    )


def _stories(samples: list[Sample], tokenizer: Tokenizer) -> str:
    """Training stories as the model sees them."""
    note = "Training stories with the lowest hashes, each token in a shade of its own; point at one to see its id."
    shown = [f'<p class="note">{note}</p>']
    for sample in samples:
        pieces = list(zip(sample.tokens, tokenizer.pieces(sample.tokens), strict=True))
        shown.append(f"<h3>{markup.code(sample.story_id)}, {sample.n_tokens:,} tokens</h3>")
        shown.append(markup.story(pieces, tokenizer.eos_id, sample.n_tokens - len(pieces)))
    return "\n".join(shown)


def _origin(manifest: Manifest) -> str:
    """Source, parameters and tokenizer: all that decides about the bytes."""
    source = manifest.source
    files = [(file["name"], file["rows"], file["split"] or "", Code(file["sha256"])) for file in source["files"]]
    more = f'<p class="note">… and {len(files) - N_FILES:,} more.</p>' if len(files) > N_FILES else ""
    facts: list[tuple[str, object]] = [
        ("source asked for", source["requested"]),
        ("source used", source["used"]),
        *((name, source[key]) for name, key in (("why", "why"), ("revision", "revision")) if source[key]),
        ("digest of the source", Code(source["digest"])),
        ("digest of the tokenizer", Code(manifest.tokenizer["sha256"])),
        ("fingerprint of the data set", Code(manifest.fingerprint)),
    ]
    parameters = [(name.replace("_", " "), _plain(value)) for name, value in sorted(manifest.parameters.items())]
    return (
        markup.table(["", ""], facts)
        + "<h3>Inputs</h3>"
        + markup.table(["file", "stories", "split", "sha256"], files[:N_FILES])
        + more
        + "<h3>Parameters</h3>"
        + markup.table(["parameter", "value"], parameters)
    )


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
