"""`prepare.py --explain STORY_ID`: from a story's id back to its source, and on to what became of it.

In: a data-set folder and an id such as `train.parquet#17`. Out: text for the terminal. Reads the manifest, and of the
shards those of the id's own range; each is checked against its digest, so an altered one is named instead of decoded.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from slm_ray.corpus.instructions import without_instruction
from slm_ray.dataset import shards
from slm_ray.dataset.manifest import REJECTED, SPLITS, TOKENIZER, Manifest, Shard, load_manifest
from slm_ray.dataset.provenance import range_number, source_row
from slm_ray.errors import UserError, visible
from slm_ray.preparation.steps import EVIDENCE_BYTES
from slm_ray.storage import StoragePath
from slm_ray.tokenization.tokenizer import Tokenizer

BORDER = "|"
FIRST_TOKENS = 16  # of a story, decoded to see whether it may be the one that a duplicate equals


@dataclass(frozen=True, kw_only=True)
class Found:
    """Where a story was found."""

    split: str  # or `rejected`
    shard: Shard
    row: int  # in the shard, from 0
    story: dict[str, Any]  # the columns of this row


def explain(folder: StoragePath, story_id: str) -> str:
    """Source, split, shard, tokens and text of a story; of a rejected one its reason and the evidence.

    Raises:
        UserError: there is no data set, no such story, or a shard was altered; names which.
    """
    manifest = load_manifest(folder)
    source = source_row(manifest, story_id)
    place = _find(folder, manifest, story_id, range_number(manifest, source))
    lines = {
        "story": visible(story_id),
        "source": f"{visible(source.file)}, row {source.row:,} of {source.rows:,}, counted from 0",
        "digest": f"sha256 {source.sha256} of the whole source file",
    }
    lines |= _rejected(folder, manifest, place) if place.split == REJECTED else _kept(folder, manifest, place)
    return "\n".join(f"{name:<9} {line}" for name, line in lines.items())


def _find(folder: StoragePath, manifest: Manifest, story_id: str, number: int | None) -> Found:
    """Look in the shards of the story's range first, then in all others: ranges may have been cut otherwise."""
    expected = set() if number is None else {shards.shard_path(split, number) for split in (*SPLITS, REJECTED)}
    listed = sorted(_all_shards(manifest), key=lambda one: one[1].file not in expected)  # stable
    place = _search(folder, listed, story_id)
    if place is None:
        raise UserError(f"story {visible(story_id)} is in no shard of {folder}: prepare the data again")
    return place


def _search(folder: StoragePath, listed: Sequence[tuple[str, Shard]], story_id: str) -> Found | None:
    """The place of a story; an altered shard is an error only where the story is in no other one."""
    altered = None
    for split, shard in listed:
        try:
            table = shards.read_shard(folder, shard)
        except UserError as error:
            altered = altered or error
            continue
        row = pc.index(table["story_id"], story_id).as_py()
        if row >= 0:
            return Found(split=split, shard=shard, row=row, story=table.slice(row, 1).to_pylist()[0])
    if altered is not None:
        raise altered
    return None


def _all_shards(manifest: Manifest) -> Iterator[tuple[str, Shard]]:
    for split in SPLITS:
        yield from ((split, shard) for shard in manifest.splits[split].shards)
    yield from ((REJECTED, shard) for shard in manifest.rejected.shards)


def _kept(folder: StoragePath, manifest: Manifest, place: Found) -> dict[str, str]:
    tokenizer = _tokenizer(folder, manifest)
    tokens, n_bytes = place.story["tokens"], place.story["n_bytes"]
    pieces = BORDER.join(visible(piece) for piece in tokenizer.pieces(tokens))
    return {
        "split": place.split,
        "shard": _shard(place),
        "size": f"{n_bytes:,} bytes of text, {len(tokens):,} tokens with the end-of-text token, "
        f"{n_bytes / len(tokens):.2f} bytes a token",
        "text": "\n          ".join(visible(line) for line in tokenizer.decode(tokens).split("\n")),
        "tokens": pieces,
        "ids": " ".join(map(str, tokens)),
    }


def _rejected(folder: StoragePath, manifest: Manifest, place: Found) -> dict[str, str]:
    reason, evidence = place.story["reason"], place.story["text"]
    is_cut = len(evidence.encode("utf-8")) >= EVIDENCE_BYTES - 3  # a character of 4 bytes may be cut off
    kept = f"the first {EVIDENCE_BYTES} bytes: " if is_cut else ""
    lines = {
        "split": "none: the story was rejected",
        "reason": reason,
        "shard": _shard(place),
        "evidence": kept + (visible(evidence) or "(nothing)"),
    }
    if reason == "duplicate":
        try:
            lines["equals"] = _twin(folder, manifest, evidence, is_cut)
        except UserError as error:  # of a shard that is not the story's own
            lines["equals"] = f"not found: {error}"
    return lines


def _shard(place: Found) -> str:
    return f"{place.shard.file}, row {place.row:,} of {place.shard.rows:,}, sha256 {place.shard.sha256}"


def _twin(folder: StoragePath, manifest: Manifest, evidence: str, is_cut: bool) -> str:
    """The kept story that a duplicate equals, found by all that is left of the duplicate: its beginning."""
    tokenizer, wanted = _tokenizer(folder, manifest), _normal(evidence)
    for split in SPLITS:
        for shard in manifest.splits[split].shards:
            table = shards.read_shard(folder, shard)
            story_id = _first_alike(table, tokenizer, wanted, is_cut, manifest.has_instructions)
            if story_id is not None:
                by = f" (by its first {EVIDENCE_BYTES} bytes)" if is_cut else ""
                return f"{visible(story_id)} in {split}, but for white space and case{by}"
    return "not found by its beginning"


def _first_alike(
    table: pa.Table, tokenizer: Tokenizer, wanted: str, is_cut: bool, has_instructions: bool
) -> str | None:
    """The first story of a shard that begins with `wanted`, or, if that is a whole story, is it."""
    for row, tokens in enumerate(table["tokens"].to_pylist()):
        n_head = None if has_instructions else FIRST_TOKENS
        head = _normal(tokenizer.decode(tokens[:n_head])).rstrip("\N{REPLACEMENT CHARACTER}")
        if has_instructions or wanted.startswith(head) or (is_cut and head.startswith(wanted)):
            text = tokenizer.decode(tokens)
            text = _normal(without_instruction(text) if has_instructions else text)
            if text == wanted or (is_cut and text.startswith(wanted)):
                found: str = table["story_id"][row].as_py()
                return found
    return None


def _normal(text: str) -> str:
    """As stories are compared: without differences in white space and case, and a character cut off at the end."""
    return " ".join(text.rstrip("\N{REPLACEMENT CHARACTER}").split()).casefold()


def _tokenizer(folder: StoragePath, manifest: Manifest) -> Tokenizer:
    path = folder / TOKENIZER
    shards.checked_content(path, manifest.tokenizer["sha256"])
    return Tokenizer.load(path)
