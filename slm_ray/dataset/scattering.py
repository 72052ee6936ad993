"""Permutations that are computed place by place and never held: the order of samples of any number.

In: places, how many there are, a key. Out: where each place leads, one to one. A Feistel network over the smallest even
number of bits that holds the domain, walked on until the result lies in it (Black and Rogaway, "Ciphers with Arbitrary
Finite Domains", CT-RSA 2002). The same on every machine and with every version of NumPy.
"""

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.int64]
Keys = npt.NDArray[np.uint64]

ROUNDS = 6
"""Of the network; four are enough for a strong one (Luby and Rackoff), more cost little."""
GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def hash_bits(values: Keys) -> Keys:
    """Hash 64-bit integers one to one (the finalizer of SplitMix64, Steele et al., OOPSLA 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def key_of(*parts: int | npt.NDArray[np.integer]) -> Keys:
    """One key out of several numbers, each a number or an array of them: the shape they broadcast to, at least (1,)."""
    key = np.zeros(1, np.uint64)
    for part in parts:
        key = hash_bits(key + np.atleast_1d(np.asarray(part)).astype(np.uint64) + GOLDEN)
    return key


def scattered(places: Numbers, sizes: Numbers | int, keys: Keys) -> Numbers:
    """Where each place leads in a permutation of range(size) that its key chooses.

    places: (n,), each at least 0 and below its size. sizes and keys: (n,), or one for all; places of one size and one
    key lead to different results, those of all places are all of range(size).
    """
    result = places.astype(np.uint64)
    limits = np.broadcast_to(np.asarray(sizes, np.uint64), result.shape)
    keys = np.broadcast_to(keys, result.shape)
    halves = np.maximum((_bit_lengths(limits - np.uint64(1)) + np.uint64(1)) // np.uint64(2), np.uint64(1))
    left = np.arange(len(result))  # those that do not lie in their domain yet
    while len(left):
        result[left] = _network(result[left], halves[left], keys[left])
        left = left[result[left] >= limits[left]]
    return result.astype(np.int64)


def _network(values: Keys, halves: Keys, keys: Keys) -> Keys:
    """One pass over values of 2 x halves bits."""
    mask = (np.uint64(1) << halves) - np.uint64(1)
    high, low = values >> halves, values & mask
    for number in range(ROUNDS):
        mixed = hash_bits((low + np.uint64(1)) * GOLDEN ^ hash_bits(keys + np.uint64(number)))
        high, low = low, high ^ (mixed & mask)
    return (high << halves) | low


def _bit_lengths(values: Keys) -> Keys:
    """Bits that each number takes: 0 of 0, 1 of 1, 2 of 2 and 3."""
    lengths = np.zeros(len(values), np.uint64)
    for shift in (32, 16, 8, 4, 2, 1):
        is_larger = values >> np.uint64(shift) > 0
        lengths += is_larger * np.uint64(shift)
        values = np.where(is_larger, values >> np.uint64(shift), values)
    return lengths + (values > 0)
