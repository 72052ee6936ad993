"""What a model was trained on, for its card: source, licence, counts, cleaning.

In: a data set's manifest, where it is at hand, and the fingerprints that the checkpoint keeps. Out: lines of Markdown
and the licence. Nothing is guessed: what no file says is said to be unknown. Files of the user are counted, not named.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from slm_ray.dataset.manifest import SPLITS, Manifest
from slm_ray.exports.source_model import SourceModel
from slm_ray.hub_reference import parse_hub_reference

CODE_LICENCE = "Apache-2.0"
HUB_LICENCES = {
    "roneneldan/TinyStories": "CDLA-Sharing-1.0",
    "roneneldan/TinyStoriesInstruct": "CDLA-Sharing-1.0",
}
"""Data sets of the hub and what their own cards said in 2026."""
SAMPLE = "sample"
"""The source of stories that this project makes itself."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSource:
    """Where the stories came from."""

    hub_name: str
    """Data set of the hub; empty for another source."""
    revision: str
    """Its commit; empty where it is not known."""
    licence: str
    """SPDX identifier; empty where no file says it."""
    text: str
    """One sentence."""


def data_source(manifest: Manifest | None) -> DataSource:
    """The source that a manifest names."""
    source: Mapping[str, Any] = manifest.source if manifest else {}
    used, revision = str(source.get("used") or ""), str(source.get("revision") or "")
    named = parse_hub_reference(used)
    if named is not None:
        licence = HUB_LICENCES.get(named.name, "")
        at = f" at revision {revision}" if revision else ""
        text = f"[{named.name}](https://huggingface.co/datasets/{named.name}){at}, from the Hugging Face hub."
        return DataSource(hub_name=named.name, revision=revision, licence=licence, text=text)
    if used == SAMPLE:
        text = "The sample corpus of SLM-Ray: stories that its code makes, not TinyStories."
        return DataSource(hub_name="", revision=revision, licence=CODE_LICENCE, text=text)
    if manifest is None:
        return DataSource(hub_name="", revision="", licence="", text="Not known here: the data set was not at hand.")
    count = len(source.get("files", ()))
    text = f"{count} file(s) of whoever prepared the data, with the digest `{source.get('digest', '?')}`."
    return DataSource(hub_name="", revision="", licence="", text=text)


def licence(given: SourceModel) -> str:
    """SPDX identifier of what made the model: this project's, or unknown (empty) where others made it, or it began from
    another, of which nothing says what that began from."""
    return CODE_LICENCE if given.state is not None and given.state.origin is None else ""


def data_lines(given: SourceModel) -> Iterator[str]:
    """The part of the card."""
    manifest, source = given.manifest, data_source(given.manifest)
    yield f"- **Source**: {source.text}"
    yield f"- **Licence of the data**: {source.licence or 'not known: ask whoever made the stories'}"
    for fingerprint, step in given.state.data_lineage if given.state else ():
        yield f"- **Data set** `{fingerprint}`, from step {step + 1:,} on"
    if manifest is None:
        return
    tokenizer = manifest.tokenizer
    yield f"- **Tokenizer**: {tokenizer['vocab_size']:,} entries, sha256 `{tokenizer['sha256']}`"
    yield from _counts(manifest)
    if manifest.parameters:
        yield "- **Cleaning**, as `pipelines/prepare.py` was told:"
        yield ""
        yield "| Option | Value |"
        yield "|---|---|"
        for name, value in sorted(manifest.parameters.items()):
            yield f"| `{name}` | `{value}` |"


def _counts(manifest: Manifest) -> Iterator[str]:
    counts = manifest.counts
    if counts:
        rejected = sum(counts.get("rejected", {}).values())
        reasons = ", ".join(f"{name} {number:,}" for name, number in sorted(counts.get("rejected", {}).items()))
        yield (
            f"- **Stories**: {counts['read']:,} read, {counts['kept']:,} kept, {counts['duplicates']:,} duplicates, "
            f"{rejected:,} rejected{f' ({reasons})' if reasons else ''}"
        )
    for name in SPLITS:
        split = manifest.splits[name]
        if split.rows:
            yield f"- **{name}**: {split.rows:,} stories, {split.tokens:,} tokens, {split.bytes:,} bytes"
