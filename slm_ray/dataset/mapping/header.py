"""What a mapped file says about itself in its first bytes: of which shards it is, and where its arrays lie.

In: a manifest, and the first bytes of a file. Out: the header, or how it is not that of these shards. `mapped` reads
and writes the rest.
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from slm_ray.dataset.manifest import Manifest
from slm_ray.dataset.shards import token_type
from slm_ray.storage import json_sha256

FORMAT = 2
HEADER_BYTES, ALIGNMENT = 4096, 64


class StaleError(Exception):
    """A mapped file is not that of these shards, or not whole; the message says which."""


def wanted_header(split: str, manifest: Manifest, eos_id: int) -> dict[str, Any]:
    """What the header of a mapped file must say, out of the manifest alone."""
    shards = manifest.splits[split].shards
    entries = [[shard.file, shard.sha256, shard.rows, shard.tokens] for shard in shards]
    tokenizer = manifest.tokenizer
    return {
        "key": json_sha256([FORMAT, tokenizer["sha256"], tokenizer["vocab_size"], eos_id, entries]),
        "dtype": token_type(manifest).newbyteorder("<").str,
        "tokens": 1 + sum(shard.tokens for shard in shards),
        "stories": sum(shard.rows for shard in shards),
        "first": eos_id,
    }


def read_header(content: bytes, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The header of a mapped file, once it was found to be that of these shards.

    It has a digest of its own. Neither digest is a signature: anybody can make a file that agrees with itself, so one
    that comes from elsewhere is compared with its shards too.

    Raises:
        StaleError: it is not.
    """
    try:
        found = json.loads(content)
        header = {name: found[name] for name in (*wanted, "lengths", "sha256")}
        is_whole = found["header_sha256"] == json_sha256(header)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise StaleError("is no file of tokens") from error
    if header["key"] != wanted["key"]:
        raise StaleError("belongs to other shards")
    n_lengths = header["lengths"]
    is_as_listed = all(type(header[name]) is type(value) and header[name] == value for name, value in wanted.items())
    if not is_whole or not is_as_listed or type(n_lengths) is not int or not 0 <= n_lengths <= wanted["stories"]:
        raise StaleError("has another header than its shards give")
    return header


def sections_of(header: Mapping[str, Any]) -> tuple[dict[str, tuple[int, int, np.dtype[Any]]], int]:
    """Where each array lies, (start, size in bytes, type), and where the last one ends."""
    shapes = {
        "tokens": (header["tokens"], np.dtype(header["dtype"])),
        "ends": (header["stories"] + 1, np.dtype("<i8")),
        "by_length": (header["stories"], np.dtype("<u4")),
        "lengths": (header["lengths"], np.dtype("<i8")),
        "counts": (header["lengths"], np.dtype("<i8")),
    }
    found, start = {}, HEADER_BYTES
    for name, (count, kind) in shapes.items():
        start = -(-start // ALIGNMENT) * ALIGNMENT
        found[name] = (start, count * kind.itemsize, kind)
        start += count * kind.itemsize
    return found, start
