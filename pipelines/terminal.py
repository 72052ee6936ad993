"""What `prepare.py` prints: progress while it works, and the account of a data set at the end.

In: a staging folder, a manifest. Out: text for the terminal. Nothing here decides about bytes.
"""

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from slm_ray import periodic, storage
from slm_ray.config.schema import ModelConfig
from slm_ray.dataset.manifest import SPLITS, Manifest
from slm_ray.errors import visible
from slm_ray.preparation.cleaned_files import CLEANED
from slm_ray.preparation.resume import Completed
from slm_ray.preparation.summary_files import SUMMARIES
from slm_ray.storage import StoragePath

POLL_S = 0.2
PLANNING_LINE_S = 10.0
REMOTE_POLL_S = 5.0  # an object store is asked less often


@contextmanager
def planning() -> Iterator[Callable[[int], None]]:
    """Show how much of the source was scanned, where that takes longer than a moment."""
    bar = tqdm(unit="B", unit_scale=True, desc="prepare: scanned", delay=1.0, disable=not sys.stderr.isatty())
    reported, n_bytes = time.monotonic(), 0

    def on_bytes(n: int) -> None:
        nonlocal reported, n_bytes
        n_bytes += n
        bar.update(n)
        if bar.disable and time.monotonic() - reported > PLANNING_LINE_S:
            reported = time.monotonic()
            sys.stderr.write(f"prepare: {n_bytes / 1e6:,.0f} MB of the source scanned\n")

    with bar:
        yield on_bytes


@contextmanager
def progress(staged: StoragePath, n_ranges: int, *, has_shards: bool = True) -> Iterator[None]:
    """Show how many ranges are cleaned and how many are written, by their files in the staging folder.

    Only these files show progress on every runner. A bar on a terminal; elsewhere one line per
    tenth of the work.
    """
    is_terminal = sys.stderr.isatty()
    bars = [
        (folder, word, tqdm(total=n_ranges, unit="range", desc=f"prepare: {word}", disable=not is_terminal))
        for folder, word in ((CLEANED, "cleaned"), (SUMMARIES, "written"))[: 1 + has_shards]
    ]
    shown = dict.fromkeys((CLEANED, SUMMARIES), 0)  # tenths of the work

    def show() -> None:
        for folder, word, bar in bars:
            finished = len(list((staged / folder).glob("[0-9]*")))
            bar.update(finished - bar.n)
            bar.refresh()  # the clock goes on
            if not is_terminal and finished * 10 // n_ranges > shown[folder]:
                shown[folder] = finished * 10 // n_ranges
                sys.stderr.write(f"prepare: {finished} of {n_ranges} ranges {word}\n")

    try:
        with periodic.every(POLL_S if storage.is_local(staged) else REMOTE_POLL_S, show):
            yield
    finally:
        for _, _, bar in bars:
            bar.close()


def account(manifest: Manifest, output: StoragePath, examples: Mapping[str, Sequence[str]]) -> str:
    """What became of the stories, the sizes of the splits, and how to name the data set."""
    counts = manifest.counts
    near = counts.get("near_duplicates", 0)
    reasons = {"duplicate": counts["duplicates"] - near, "near_duplicate": near, **counts["rejected"]}
    lines = [
        _source_line(manifest),
        f"stories  read {counts['read']:,} = kept {counts['kept']:,} + duplicates {counts['duplicates']:,}"
        f" + rejected {sum(counts['rejected'].values()):,} ({counts['kept'] / counts['read']:.2%} kept)",
    ]
    for reason, count in reasons.items():
        if count:
            shown = ", ".join(examples.get(reason, ()))
            lines.append(f"  {reason:<20} {count:>9,}  {f'e.g. {shown}; all in rejected/' if shown else ''}")
    for name in SPLITS:
        split = manifest.splits[name]
        per_token = f", {split.bytes / split.tokens:.2f} bytes a token" if split.tokens else ""
        lines.append(f"{name:<10} {split.rows:>9,} stories {split.tokens:>12,} tokens{per_token}")
    lines.append(_tokenizer_line(manifest))
    lines.append(f"fingerprint {manifest.fingerprint}")
    lines.append(f"data set in {output}, pictures in {output / 'report' / 'report.html'}")
    return "\n".join(line.rstrip() for line in lines)


def fallback_notice(why: str, n_stories: int) -> str:
    """A warning that cannot be overlooked: `auto` fell back to the sample corpus."""
    bar = "!" * 100
    return (
        f"{bar}\n! NOT real TinyStories: the hub could not be used ({why}).\n"
        f"! Using {n_stories:,} stories of the built-in sample corpus instead; the manifest records it.\n"
        f"! With a network, or with --source PATH, run again with --force.\n{bar}"
    )


def _source_line(manifest: Manifest) -> str:
    source = manifest.source
    asked = f" (asked for {source['requested']}: {source['why']})" if source["why"] else ""
    names = ", ".join(_named(file) for file in source["files"][:4])
    more = f" and {len(source['files']) - 4} more" if len(source["files"]) > 4 else ""
    return f"source   {source['used']}: {names}{more}{asked}"


def _named(file: Mapping[str, Any]) -> str:
    """A file, and how a text file was cut into stories."""
    name = visible(file["name"])
    return f"{name} (cut: {file['cut']})" if file.get("cut") else name


def warnings(manifest: Manifest) -> list[str]:
    """What a user should know of a new data set, and might not see in its account."""
    size, wanted = _entries(manifest)
    n_tokens, seq_len = manifest.splits["train"].tokens, ModelConfig().seq_len
    found = {
        f"the tokenizer has {size:,} entries and not {wanted:,}, as the training stories that it learns from "
        "have too few different words (of its own, which end at spaces and marks): prepare more stories, or lower "
        "--vocab-size": size < wanted,
        f"the training split has {n_tokens} tokens, and one sample of the default model needs {seq_len}: prepare more "
        "stories, or train with a lower --model.seq-len": n_tokens < seq_len,
        "no story is in the validation split, without which train.py does not begin: prepare more stories or a larger "
        "--validation-fraction, or give a --validation-source": not manifest.splits["validation"].rows,
    }
    return [f"warning: {text}" for text, holds in found.items() if holds]


def _entries(manifest: Manifest) -> tuple[int, int]:
    """How many entries the tokenizer has, and how many were asked for."""
    size: int = manifest.tokenizer["vocab_size"]
    return size, manifest.parameters["tokenizer"].get("trained", {}).get("vocab_size", size)


def _tokenizer_line(manifest: Manifest) -> str:
    size, wanted = _entries(manifest)
    missing = f" (not {wanted:,}: the stories have too few different words)" if size < wanted else ""
    return f"tokenizer  {size:,} entries{missing}"


def continuation_notice(completed: Completed, n_ranges: int) -> str:
    """What a job prints when it continues an interrupted one."""
    return (
        f"prepare: continuing an interrupted job; skipping {len(completed.cleaned)} of {n_ranges} ranges that are "
        f"cleaned, {len(completed.written)} that are written"
    )
