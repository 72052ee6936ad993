"""What a data set is made of: `manifest.json`, published last.

In: the shards of each split, source and parameters. Out: a manifest that comes back as it was written, and the
fingerprint that identifies the data set. A folder without a manifest is no data set.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slm_ray.config.mixtures import DataShare, part_names, parts_of, shares
from slm_ray.errors import UserError, reason
from slm_ray.storage import StoragePath, json_sha256, read, storage_path

FORMAT_VERSION = 1
SPLITS = ("train", "validation", "test")
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
REJECTED = "rejected"
BLOCK = 10_000
"""Samples in which the shares of a mixture are kept exactly."""
PREPARE_HINT = "run `python pipelines/prepare.py` first"


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One Parquet file of one split, or of the rejected stories."""

    file: str  # relative to the data-set folder, with "/"
    rows: int  # stories
    tokens: int  # ids, end-of-text tokens included; 0 for rejected stories
    bytes: int  # UTF-8 bytes of the cleaned text; 0 for rejected stories
    sha256: str  # of the file


@dataclass(frozen=True, kw_only=True)
class Split:
    """The shards of one split, in reading order, and their sums."""

    rows: int
    tokens: int
    bytes: int
    shards: tuple[Shard, ...]

    @classmethod
    def of(cls, shards: tuple[Shard, ...]) -> "Split":
        """Put shards in order of their names and add them up."""
        ordered = tuple(sorted(shards, key=lambda shard: shard.file))
        return cls(
            rows=sum(shard.rows for shard in ordered),
            tokens=sum(shard.tokens for shard in ordered),
            bytes=sum(shard.bytes for shard in ordered),
            shards=ordered,
        )


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a data set is made of; `fingerprint` identifies it."""

    format_version: int
    source: dict[str, Any]  # requested, used, why, revision, digest, files
    parameters: dict[str, Any]  # everything that decides about bytes
    tokenizer: dict[str, Any]  # file, sha256, vocab_size, end_token, end_token_id
    splits: dict[str, Split]  # every name of SPLITS, empty ones too
    rejected: Split  # evidence; its tokens and bytes are 0
    counts: dict[str, Any]  # read, kept, duplicates, rejected by reason
    fingerprint: str

    @property
    def has_instructions(self) -> bool:
        """Whether an instruction stands before each story."""
        return bool(self.parameters.get("instructions"))

    @property
    def trained_model(self) -> str:
        """Kind of the tokenizer that was learned from its stories; empty where one was given."""
        return str(self.parameters.get("tokenizer", {}).get("trained", {}).get("model", ""))

    def to_json(self) -> str:
        """Sorted keys, two spaces: equal manifests are equal bytes."""
        return json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        """Read `to_json()`'s output back. Raises KeyError, TypeError or ValueError where it is not that."""
        fields = json.loads(text)
        if fields["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format version {fields['format_version']}, expected {FORMAT_VERSION}")
        fields["splits"] = {name: _split_from(fields["splits"][name]) for name in SPLITS}
        fields["rejected"] = _split_from(fields["rejected"])
        return cls(**fields)


def fingerprint(
    *,
    source_digest: str,
    parameters: Mapping[str, Any],
    tokenizer_sha256: str,
    splits: Mapping[str, Split],
) -> str:
    """One sha256 that identifies a data set: no path, host or time goes into it."""
    content = {
        "format_version": FORMAT_VERSION,
        "source": source_digest,
        "parameters": dict(parameters),
        "tokenizer": tokenizer_sha256,
        "shards": [[shard.file, shard.sha256] for name in SPLITS for shard in splits[name].shards],
    }
    return json_sha256(content)


@dataclass(frozen=True, kw_only=True)
class Part:
    """One data set of a mixture."""

    folder: str
    manifest: Manifest
    quota: int
    """Of the samples of each block."""


@dataclass(frozen=True, kw_only=True)
class MixedManifest(Manifest):
    """Several data sets of one tokenizer as one, never written to a disk: its splits have the sums and no shards."""

    parts: tuple[Part, ...]

    @classmethod
    def of(cls, weights: Sequence[tuple[str, float]]) -> "MixedManifest":
        """Raises: UserError when one is missing, they do not go together, or a weight is too small for a block."""
        manifests = [load_manifest(folder) for folder, _ in weights]
        first = manifests[0]
        for (folder, _), manifest in zip(weights, manifests):
            if manifest.tokenizer["sha256"] != first.tokenizer["sha256"]:
                raise UserError(
                    f"{folder} has another tokenizer than {weights[0][0]}: prepare it with --tokenizer {weights[0][0]}"
                )
            if manifest.has_instructions != first.has_instructions:
                raise UserError(f"of {weights[0][0]} and {folder} one has instructions and one has none")
            if manifest.parameters.get("instructions") != first.parameters.get("instructions"):
                raise UserError(
                    f"{folder} has instructions of another form than {weights[0][0]}: prepare both with one version"
                )
            if not manifest.splits["train"].tokens:
                raise UserError(f"{folder} has no training stories: leave it out of the mixture")
        found = [manifest.fingerprint for manifest in manifests]
        if len(set(found)) < len(found):
            twice = [folder for (folder, _), mark in zip(weights, found) if found.count(mark) > 1]
            raise UserError(f"{' and '.join(twice)} are one data set: give each data set once, with its weight")
        quotas = shared_out([weight for _, weight in weights], BLOCK)
        if 0 in quotas:
            folder, weight = weights[quotas.index(0)]
            raise UserError(f"data: {folder}={weight:g} is too small a share: at least 1 of {BLOCK:,} is one")
        mark = json_sha256(["mixture", BLOCK, [[*pair] for pair in zip(found, quotas)]])
        parts = zip((folder for folder, _ in weights), manifests, quotas)
        return cls(
            format_version=FORMAT_VERSION,
            source={"used": "mixture", "digest": mark},
            parameters={
                name: value
                for name, value in first.parameters.items()
                if all(name in one.parameters and one.parameters[name] == value for one in manifests)
            },
            tokenizer=first.tokenizer,
            splits={name: _sum([manifest.splits[name] for manifest in manifests]) for name in SPLITS},
            rejected=_sum([manifest.rejected for manifest in manifests]),
            counts={},
            fingerprint=mark,
            parts=tuple(Part(folder=folder, manifest=manifest, quota=quota) for folder, manifest, quota in parts),
        )


def _sum(splits: Sequence[Split]) -> Split:
    return Split(
        rows=sum(split.rows for split in splits),
        tokens=sum(split.tokens for split in splits),
        bytes=sum(split.bytes for split in splits),
        shards=(),
    )


def _exact_shares(weights: Sequence[float], whole: int) -> list[float]:
    """Scaled first only where their sum is no number, so that the shares of other weights keep every bit."""
    try:
        total = math.fsum(weights)
    except OverflowError:
        return [share * whole for share in shares(weights)]
    return [weight / total * whole for weight in weights]


def shared_out(weights: Sequence[float], whole: int) -> list[int]:
    """Whole numbers in the proportion of some weights, with the sum `whole` (largest remainders; the first of equals).

    [2, 1], 10 -> [7, 3]
    """
    exact = _exact_shares(weights, whole)
    found = [int(share) for share in exact]
    by_rest = sorted(range(len(exact)), key=lambda number: found[number] - exact[number])
    for number in by_rest[: whole - sum(found)]:
        found[number] += 1
    return found


def data_sets(folder: str | StoragePath, manifest: Manifest) -> list[tuple[str | StoragePath, Manifest]]:
    """The data sets behind a manifest: that of the folder, or those of a mixture."""
    if isinstance(manifest, MixedManifest):
        return [(part.folder, part.manifest) for part in manifest.parts]
    return [(folder, manifest)]


def named_sets(folder: str | StoragePath, manifest: Manifest) -> list[tuple[str, Manifest, float]]:
    """The data sets behind a manifest, each with its name and its share of the samples, which is 1 of one alone."""
    sets = data_sets(folder, manifest)
    names = part_names([storage_path(place).as_posix() for place, _ in sets])
    weights = [part.quota / BLOCK for part in manifest.parts] if isinstance(manifest, MixedManifest) else [1.0]
    return [(name, its, weight) for name, (_, its), weight in zip(names, sets, weights)]


def mixture_of(folder: str | StoragePath, manifest: Manifest) -> dict[str, list[DataShare]]:
    """What records say of a mixture, by its fingerprint; nothing of one data set."""
    if not isinstance(manifest, MixedManifest):
        return {}
    sets = named_sets(folder, manifest)
    found = [DataShare(name=name, fingerprint=its.fingerprint, weight=weight) for name, its, weight in sets]
    return {manifest.fingerprint: found}


def home_of(data: str | StoragePath) -> StoragePath:
    """The folder in which the tokenizer lies: of a mixture, that of its first data set. Raises: UserError."""
    parts = parts_of(data) if isinstance(data, str) else []
    return storage_path(parts[0][0] if parts else data)


def load_manifest(folder: str | StoragePath) -> Manifest:
    """The manifest of a data-set folder, or of a mixture (`A=0.7 B=0.3`).

    Raises:
        UserError: there is none, or it is not one that this version reads; or the data sets do not go together.
    """
    if isinstance(folder, str) and (weights := parts_of(folder)):
        return MixedManifest.of(weights)
    path = storage_path(folder) / MANIFEST
    try:
        content = read(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"no {MANIFEST} in {folder}: {PREPARE_HINT}") from error
    except Exception as error:  # each object store has errors of its own
        raise UserError(f"cannot read {path}: {reason(error)}") from error
    try:
        return Manifest.from_json(content.decode("utf-8"))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is no manifest this version reads ({error}): prepare the data again") from error


def _split_from(fields: Mapping[str, Any]) -> Split:
    return Split(**{**fields, "shards": tuple(Shard(**shard) for shard in fields["shards"])})
