"""Which split a story belongs to, by the hash of its text alone.

In: a story's cleaned text. Out: its hash, its split, and whether the tokenizer learns from it; the same in every run.
"""

import hashlib

import numpy as np
import numpy.typing as npt
import pyarrow as pa

HASH_BYTES = 16


def story_hash(text: str) -> bytes:
    """16 bytes that name a story: equal for texts that differ only in white space and case."""
    normalised = " ".join(text.split()).casefold()
    return hashlib.blake2b(normalised.encode("utf-8"), digest_size=HASH_BYTES).digest()


def split_of_hash(digest: bytes, fractions: tuple[float, float]) -> str:
    """The split of a story by its `story_hash`; `fractions` are the shares of validation and test."""
    validation, test = fractions
    place = int.from_bytes(digest[:8]) / 2**64  # uniform in [0, 1)
    if place < validation:
        return "validation"
    return "test" if place < validation + test else "train"


def assign_split(text: str, fractions: tuple[float, float]) -> str:
    """The split of a story by its text: `train`, `validation` or `test`.

    Two copies that differ only in white space or case always share a split, so no copy of a training story is
    ever validated on. `fractions` are the shares of validation and test.
    """
    return split_of_hash(story_hash(text), fractions)


def is_sampled(digest: bytes, share: float) -> bool:
    """Whether a story belongs to a fixed sample of about `share` of all, by other bits than the split's."""
    return int.from_bytes(digest[8:16]) < share * 2**64


def hash_bytes(hashes: pa.FixedSizeBinaryArray) -> npt.NDArray[np.uint8]:
    """The hashes as rows of bytes, (rows, 16); where a hash is null they mean nothing."""
    content = np.frombuffer(hashes.buffers()[1], np.uint8)
    return content.reshape(-1, HASH_BYTES)[hashes.offset : hashes.offset + len(hashes)]


def splits_of_hashes(hashes: pa.FixedSizeBinaryArray, fractions: tuple[float, float]) -> pa.Array:
    """`split_of_hash` of every row."""
    validation, test = fractions
    places = hash_bytes(hashes)[:, :8].copy().view(">u8")[:, 0] / 2**64  # (rows,) uniform in [0, 1)
    return pa.array(np.where(places < validation, "validation", np.where(places < validation + test, "test", "train")))
