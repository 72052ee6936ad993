"""What a data set is made of: `manifest.json`, published last.

In: the shards of each split, source and parameters. Out: a manifest that comes back as it was written, and the
fingerprint that identifies the data set. A folder without a manifest is no data set.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from slm_ray.errors import UserError, one_line
from slm_ray.storage import StoragePath, json_sha256, storage_path

FORMAT_VERSION = 1
SPLITS = ("train", "validation", "test")
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
REJECTED = "rejected"
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


def load_manifest(folder: str | StoragePath) -> Manifest:
    """The manifest of a data-set folder.

    Raises:
        UserError: there is none, or it is not one that this version reads.
    """
    path = storage_path(folder) / MANIFEST
    try:
        return Manifest.from_json(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"no {MANIFEST} in {folder}: {PREPARE_HINT}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is no manifest this version reads ({error}): prepare the data again") from error
    except Exception as error:  # each object store has errors of its own
        raise UserError(f"cannot read {path}: {one_line(error)}") from error


def _split_from(fields: Mapping[str, Any]) -> Split:
    return Split(**{**fields, "shards": tuple(Shard(**shard) for shard in fields["shards"])})
