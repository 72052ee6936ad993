"""Encoding each distinct word once: the fast path of `Tokenizer.encode_batch`.

In: the texts of a batch. Out: their ids, gathered from a memo of words. Most of a story's words were seen before, so
nearly all of the work is a dictionary encoding by Arrow and a gather by NumPy; the tokenizer itself sees a word once
in the life of a process.
"""

import itertools
import sys
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Ids = npt.NDArray[np.unsignedinteger[Any]]

SPACE = 0x20
MAX_WORDS = 1_000_000
"""Words that are remembered, about 200 MB; beyond it the memo begins anew."""
_CHARS_AT_ONCE = 1 << 18
MAX_BYTES = 1 << 26
"""Of their text and ids: without spaces, a word may be a whole story."""


def cut_words(texts: pa.LargeStringArray) -> pa.ListArray:
    """Cut texts before every space, as a list of dictionary-encoded words per text.

    Each word keeps the space before it, so `["a b b"]` gives `[["a", " b", " b"]]` with two distinct words, and the
    words of a text joined are the text. Words are slices of the text's own memory: none is copied.
    """
    starts = np.frombuffer(texts.buffers()[1], np.int64)[texts.offset : texts.offset + len(texts) + 1]
    first, last = int(starts[0]), int(starts[-1])
    content = texts.buffers()[2]
    is_start = np.frombuffer(content, np.uint8, last - first, first) == SPACE if last > first else np.empty(0, bool)
    row_starts = starts[:-1][starts[1:] > starts[:-1]] - first  # a text of no bytes has no words
    is_start[row_starts] = True
    borders = np.append(np.flatnonzero(is_start) + first, last)
    words = pa.LargeStringArray.from_buffers(len(borders) - 1, pa.py_buffer(borders), content)
    row_words = np.searchsorted(borders, starts).astype(np.int32)  # (texts + 1,) which word each text begins with
    return pa.ListArray.from_arrays(pa.array(row_words), words.dictionary_encode())


def are_apart(words: pa.ListArray) -> bool:
    """Whether no space of these texts stands beside other white space.

    Then each space begins a pre-token of GPT-2's pattern, ` ?letters| ?digits| ?others|spaces`, in which only a run
    of white space goes on past a space.
    """
    distinct = words.values.dictionary.to_pylist()
    return not any(word[-1:].isspace() or (word[:1] == " " and word[1:2].isspace()) for word in distinct)


class WordEncoder:
    """Ids of words, each encoded by `inner` once and remembered. May be used by several threads."""

    def __init__(self, inner: Any, numpy_type: type[np.unsignedinteger[Any]]) -> None:
        self._inner = inner
        self._type = numpy_type
        self._lock = threading.Lock()
        self._known: dict[str, int] = {}
        self._n_bytes = 0  # of the words that are known
        self._ids: Ids = np.empty(0, numpy_type)
        self._lengths = np.empty(0, np.int32)  # 32 bits are enough for a batch, and half the memory to go through
        self._starts = np.empty(0, np.int32)

    def encode(self, words: pa.ListArray) -> pa.ListArray:
        """Ids of texts that were cut by `cut_words` and are `are_apart`, one list per text."""
        distinct = words.values.dictionary.to_pylist()
        with self._lock:
            known = self._places(distinct)
            ids, starts, lengths = self._ids, self._starts, self._lengths
        place = words.values.indices.to_numpy()  # (words,) which distinct word
        n_ids = lengths[known].take(place)  # (words,)
        ends = np.zeros(len(place) + 1, np.int32)  # where each word's ids begin in the result
        np.cumsum(n_ids, out=ends[1:])
        shift = starts[known].take(place) - ends[:-1]
        gathered = ids.take(np.repeat(shift, n_ids) + np.arange(ends[-1], dtype=np.int32))
        return pa.ListArray.from_arrays(pa.array(ends.take(words.offsets.to_numpy())), pa.array(gathered))

    def _places(self, distinct: list[str]) -> npt.NDArray[np.int64]:
        """Where the memo has each of these words; new ones are encoded first."""
        new = [word for word in distinct if word not in self._known]
        n_bytes = sum(map(sys.getsizeof, new))
        if len(self._known) + len(new) > MAX_WORDS or self._n_bytes + n_bytes + self._ids.nbytes > MAX_BYTES:
            self._known, new = {}, distinct
            self._n_bytes, n_bytes = 0, sum(map(sys.getsizeof, new))
            self._ids, self._lengths = self._ids[:0], self._lengths[:0]
        if new:
            self._n_bytes += n_bytes
            ids, lengths = encode_flat(self._inner, new, self._type)
            self._known.update(zip(new, range(len(self._lengths), len(self._lengths) + len(new))))
            self._ids = np.concatenate((self._ids, ids))
            self._lengths = np.concatenate((self._lengths, lengths.astype(np.int32)))
            self._starts = offsets(self._lengths.astype(np.int64))[:-1].astype(np.int32)
        return np.fromiter(map(self._known.__getitem__, distinct), np.int64, len(distinct))


def encode_flat(inner: Any, texts: list[str], numpy_type: type[np.unsignedinteger[Any]]) -> tuple[Ids, Any]:
    """Ids of all texts in one array, and how many each has."""
    parts, n_ids = [np.empty(0, numpy_type)], [np.empty(0, np.int64)]
    for some in _slices(texts):
        rows = [encoding.ids for encoding in inner.encode_batch_fast(some, add_special_tokens=False)]
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        parts.append(np.fromiter(itertools.chain.from_iterable(rows), numpy_type, int(lengths.sum())))
        n_ids.append(lengths)
    return np.concatenate(parts), np.concatenate(n_ids)


def _slices(texts: list[str]) -> Iterator[list[str]]:
    """Some texts at a time: while they are encoded, a character takes 200 times its own memory."""
    first = n_chars = 0
    for place, text in enumerate(texts):
        n_chars += len(text)
        if n_chars > _CHARS_AT_ONCE:
            yield texts[first : place + 1]
            first, n_chars = place + 1, 0
    yield texts[first:]


def offsets(lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Where each item begins: `[2, 3]` becomes `[0, 2, 5]`."""
    return np.concatenate(([0], np.cumsum(lengths)))
