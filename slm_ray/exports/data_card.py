"""What a model was trained on, for its card: source, licence, counts, cleaning.

In: a data set's manifest, where it is at hand, and the fingerprints that the checkpoint keeps. Out: lines of Markdown
and the licence. Nothing is guessed: what no file says is said to be unknown. Files of the user are counted, not named.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from slm_ray.config.mixtures import Mixtures
from slm_ray.dataset.licences import CODE_LICENCE, SAMPLE, UNKNOWN, licence_of, source_licence
from slm_ray.dataset.manifest import BLOCK, SPLITS, Manifest, MixedManifest, data_sets
from slm_ray.exports.source_model import SourceModel
from slm_ray.hub_reference import parse_hub_reference
from slm_ray.runs.train_state import Origin, TrainState


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
    """The source that a manifest names; of a mixture, those of its data sets, and the licence that all of them have."""
    if isinstance(manifest, MixedManifest):
        sources = [data_source(part.manifest) for part in manifest.parts]
        shares = [f"{part.quota / BLOCK:.2%}: {one.text}" for part, one in zip(manifest.parts, sources)]
        text = f"A mixture of {len(shares)} data sets. {' '.join(shares)}"
        return DataSource(hub_name="", revision="", licence=licence_of(manifest), text=text)
    source: Mapping[str, Any] = manifest.source if manifest else {}
    used, revision = str(source.get("used") or ""), str(source.get("revision") or "")
    named, licence = parse_hub_reference(used), source_licence(source)
    if named is not None:
        at = f" at revision {revision}" if revision else ""
        text = f"[{named.name}](https://huggingface.co/datasets/{named.name}){at}, from the Hugging Face hub."
        return DataSource(hub_name=named.name, revision=revision, licence=licence, text=text)
    if used == SAMPLE:
        text = "The sample corpus of SLM-Ray: stories that its code makes, not TinyStories."
        return DataSource(hub_name="", revision=revision, licence=licence, text=text)
    if manifest is None:
        return DataSource(hub_name="", revision="", licence="", text="Not known here: the data set was not at hand.")
    count = len(source.get("files", ()))
    text = f"{count} file(s) of whoever prepared the data, with the digest `{source.get('digest', '?')}`."
    return DataSource(hub_name="", revision="", licence="", text=text)


def hub_names(manifest: Manifest | None) -> list[str]:
    """The data sets of the hub that a manifest names; of a mixture those of all its data sets."""
    sources = [data_source(its) for _, its in data_sets("", manifest)] if manifest else []
    return list(dict.fromkeys(source.hub_name for source in sources if source.hub_name))


def licence(given: SourceModel) -> str:
    """SPDX identifier of what made the model: this project's; or unknown (empty) where others made it or any model that
    it goes back to, or where nothing says what one of these began from."""
    if given.state is None:
        return ""
    return CODE_LICENCE if given.state.is_ours else ""


def licence_text(given: SourceModel) -> str:
    """The same in words: why it is unknown."""
    if known := licence(given):
        return known
    if given.state is None or any(link.is_of_others for link in _before(given.state)):
        return "not only this project; see the models that it goes back to"
    return "not known: nothing says what all the models that it goes back to began from"


def _before(state: TrainState) -> list[Origin]:
    """Every model that it began or learned from, and those of these."""
    return [link for one in (state.origin, *state.teachers) if one for link in one.every]


def before_lines(state: TrainState) -> Iterator[str]:
    """The models that it began from and learned from, each with those before it, the nearest first."""
    if state.origin is not None:
        yield from _origin_lines(state.origin, "Begun from")
    for teacher in state.teachers:
        yield from _origin_lines(teacher, "Learned from")
    if not state.are_teachers_known:
        yield "- Not all models that it learned from are known"


def _origin_lines(origin: Origin, begun: str) -> Iterator[str]:
    for number, link in enumerate(origin.chain):
        step = f" at step {link.step:,}" if link.step else ""
        run = f" of run `{link.run_id}`" if link.run_id else ""
        others = ", made by others: ask them" if link.is_of_others else ""
        how = "Which began from" if number else begun
        yield f"- **{how}** `{link.reference}`{step}{run}, weights sha256 `{link.weights_sha256}`{others}"
        yield from (f"  - with {change}" for change in link.changes)
        for teacher in link.teachers:
            yield from _origin_lines(teacher, "Which learned from")
    last = origin.chain[-1]
    if last.is_start_known:
        yield "- **Which began from** random weights"
    elif not last.is_of_others:
        yield "- What that began from is not known"


def data_licence(given: SourceModel) -> str:
    """Licence of the stories, in words: of the data set at hand, which may not be the only one."""
    known, state = data_source(given.manifest).licence, given.state
    if not known:
        return "not known"
    seen = {data for lineage, _ in _lineages(given) for data, _ in lineage}
    if len(seen) < 2 and (state is None or state.is_ours):
        return known
    return f"{known} of the data set described below; what else it learned from may have others, not known here"


def _lineages(given: SourceModel) -> list[tuple[list[tuple[str, int]], Mixtures]]:
    """Data sets that the model and those before it were trained on, and what the mixtures among them are."""
    if given.state is None:
        return []
    before = [(link.lineage, link.mixtures) for link in _before(given.state)]
    return [(given.state.data_lineage, given.state.mixtures), *before]


def data_lines(given: SourceModel) -> Iterator[str]:
    """The part of the card."""
    manifest, source = given.manifest, data_source(given.manifest)
    yield f"- **Source**: {source.text}"
    yield f"- **Licence of the data**: {source.licence or UNKNOWN}"
    for number, (lineage, mixtures) in enumerate(_lineages(given)):
        whose = " of a model that it goes back to" if number else ""
        for fingerprint, step in lineage:
            kind = "Mixture" if fingerprint in mixtures else "Data set"
            yield f"- **{kind}**{whose} `{fingerprint}`, from step {step + 1:,} on"
            for one in mixtures.get(fingerprint, ()):
                yield f"  - **{one.weight:.2%}** of its samples from `{one.name}`, data set `{one.fingerprint}`"
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
