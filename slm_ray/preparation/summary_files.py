"""Summaries of ranges as files: a range is finished when its summary is there, whole and named by its number.

In: a `RangeSummary`, or a staging folder. Out: one JSON file per range beside the staged shards; the summaries back.
Written by `steps`, read by `resume` and at the end of `pipelines/prepare.py`.
"""

import base64
import dataclasses
import json
import zlib
from collections.abc import Iterable, Iterator

import numpy as np

from slm_ray.dataset.manifest import Shard
from slm_ray.preparation.summary import Counts, RangeSummary, Sample
from slm_ray.storage import StoragePath, make_folder, read, replace_file

SUMMARIES = "ranges"  # folder of the summaries, beside the staged shards
_FORMAT = "slm-ray range summary 4"


def save_summary(folder: StoragePath, summary: RangeSummary) -> None:
    """Write it as one JSON file, put in place by a rename: there it means that the range is finished."""
    path = folder / SUMMARIES / f"{summary.number:05d}.json"
    make_folder(path.parent)
    replace_file(path, _to_json(summary).encode("utf-8"))


def load_summary(path: StoragePath) -> RangeSummary | None:
    """One summary; None where there is none, or what is there is torn or foreign: the range is not finished.

    Raises what the file system raises where it cannot be read now.
    """
    try:
        content = read(path)
    except (FileNotFoundError, IsADirectoryError):
        return None
    try:
        summary = _from_json(content.decode("utf-8"))
        return summary if path.name == f"{summary.number:05d}.json" else None
    except (ValueError, KeyError, TypeError, AttributeError, zlib.error):
        return None


def load_summaries(folder: StoragePath) -> Iterator[RangeSummary]:
    """All whole summaries below a staging folder, one at a time, in order of their ranges."""
    found: Iterable[StoragePath] = (folder / SUMMARIES).glob("[0-9]*.json")
    for path in sorted(found, key=lambda path: (len(path.name), path.name)):
        summary = load_summary(path)
        if summary is not None:
            yield summary


def _to_json(summary: RangeSummary) -> str:
    """Token counts are packed: as text, those of a large vocabulary would be most of the file. Words, of which there
    are thousands and none has a line break, are one text, and their counts packed too."""
    fields = {
        **vars(summary),
        "format": _FORMAT,
        "shards": {name: dataclasses.asdict(shard) for name, shard in summary.shards.items()},
        "samples": [dataclasses.asdict(sample) for sample in summary.samples],
        "token_counts": _packed(summary.token_counts),
        "word_counts": ["\n".join(summary.word_counts), _packed(np.array([*summary.word_counts.values()], np.int64))],
    }
    return json.dumps(fields, ensure_ascii=False)


def _from_json(text: str) -> RangeSummary:
    """JSON knows no whole numbers as keys: they come back from text."""
    fields = json.loads(text)
    if fields.pop("format") != _FORMAT:
        raise ValueError(f"expected {_FORMAT}")
    fields["token_counts"] = _unpacked(fields["token_counts"])
    words, counts = fields["word_counts"]
    fields["word_counts"] = dict(zip(words.split("\n") if words else (), _unpacked(counts).tolist(), strict=True))
    fields["shards"] = {name: Shard(**shard) for name, shard in fields["shards"].items()}
    fields["samples"] = [Sample(**sample) for sample in fields["samples"]]
    for name in ("chars", "words", "tokens"):
        fields[name] = {int(value): count for value, count in fields[name].items()}
    return RangeSummary(**fields)


def _packed(counts: Counts) -> str:
    return base64.b64encode(zlib.compress(counts.astype("<u8").tobytes(), 1)).decode("ascii")


def _unpacked(text: str) -> Counts:
    return np.frombuffer(zlib.decompress(base64.b64decode(text, validate=True)), "<u8").astype(np.int64)
