"""What `prepare.py` says: progress while it works, and the account of a data set at the end.

In: a staging folder, a manifest. Out: text for the terminal. Nothing here decides about bytes.
"""

import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from slm_ray.shards import SPLITS, Manifest
from slm_ray.summary import SUMMARIES

POLL_S = 0.2


@contextmanager
def progress(staged: Path, n_ranges: int) -> Iterator[None]:
    """Show how many ranges are finished, by their summaries in the staging folder.

    The files are the one sign of progress that every runner gives. A bar on a terminal; elsewhere one line per
    tenth of the work.
    """
    done = threading.Event()
    watching = threading.Thread(target=_watch, args=(staged, n_ranges, done), daemon=True)
    watching.start()
    try:
        yield
    finally:
        done.set()
        watching.join()


def account(manifest: Manifest, output: Path, examples: Mapping[str, Sequence[str]]) -> str:
    """What became of the stories, the sizes of the splits, and how to name the data set."""
    counts = manifest.counts
    reasons = {"duplicate": counts["duplicates"], **counts["rejected"]}
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
    """What is said, loudly, when `auto` does not mean what it says."""
    bar = "!" * 100
    return (
        f"{bar}\n! NOT real TinyStories: the hub could not be used ({why}).\n"
        f"! Using {n_stories:,} stories of the built-in sample corpus instead; the manifest records it.\n"
        f"! With a network, or with --source PATH, run again with --force.\n{bar}"
    )


def _source_line(manifest: Manifest) -> str:
    source = manifest.source
    asked = f" (asked for {source['requested']}: {source['why']})" if source["why"] else ""
    names = ", ".join(file["name"] for file in source["files"][:4])
    more = f" and {len(source['files']) - 4} more" if len(source["files"]) > 4 else ""
    return f"source   {source['used']}: {names}{more}{asked}"


def _tokenizer_line(manifest: Manifest) -> str:
    size = manifest.tokenizer["vocab_size"]
    wanted = manifest.parameters["tokenizer"].get("trained", {}).get("vocab_size", size)
    missing = f" (not {wanted:,}: the stories have too few different words)" if size < wanted else ""
    return f"tokenizer  {size:,} entries{missing}"


def _watch(staged: Path, n_ranges: int, done: threading.Event) -> None:
    is_terminal = sys.stderr.isatty()
    bar = tqdm(total=n_ranges, unit="range", desc="prepare", disable=not is_terminal)
    said = 0
    while True:
        is_last = done.wait(POLL_S)
        finished = len(list((staged / SUMMARIES).glob("[0-9]*.json")))
        bar.update(finished - bar.n)
        bar.refresh()  # the clock goes on during the first reading
        if not is_terminal and finished * 10 // n_ranges > said:
            said = finished * 10 // n_ranges
            sys.stderr.write(f"prepare: {finished} of {n_ranges} ranges written\n")
        if is_last:
            bar.close()
            return
