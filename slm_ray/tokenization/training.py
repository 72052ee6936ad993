"""Tokenizers learned from stories: byte-level BPE, and Unigram over bytes.

In: stories and a vocabulary size. Out: a `Tokenizer` that keeps every text, with `<|endoftext|>` as id 0. The result
depends on the counts of words alone.
"""

import io
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from slm_ray.errors import UserError
from slm_ray.tokenization.tokenizer import END_OF_TEXT, MIN_VOCAB_SIZE, Tokenizer

TOKENIZER_MODELS = ("bpe", "unigram")
_LONGEST_WORD = 1000  # bytes, of a word to learn from: BPE's trainer takes minutes for one of a million
_PART_CHARS = _LONGEST_WORD // 4  # of a longer one: so many characters have no more bytes
_SPACE_BYTE = "\u0120"  # how byte-level tokenizers write a space
_SPACE = "\u2581"  # how SentencePiece does
_UNSEEN = 10.0  # how much less likely, in nats, than the rarest piece a byte is that no story has

_BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)  # with GPT-2's pattern

Piece = tuple[str, float]
"""An entry of a Unigram vocabulary and the logarithm of its probability."""


def train(texts: Iterable[str], vocab_size: int, model: str = "bpe") -> Tokenizer:
    """Learn a byte-level tokenizer of one of `TOKENIZER_MODELS`, `<|endoftext|>` as id 0.

    Any text can be written and read back, and the result depends on the counts of words alone. Texts with too
    few different words give fewer than `vocab_size` entries.

    Raises:
        UserError: `vocab_size` has no room for all bytes.
    """
    return train_unigram(texts, vocab_size) if model == "unigram" else train_bpe(texts, vocab_size)


def train_bpe(texts: Iterable[str], vocab_size: int = 4096) -> Tokenizer:
    """Learn byte-level BPE (GPT-2's pre-token pattern) with `<|endoftext|>` as id 0.

    All 256 bytes are in the alphabet, so any Unicode text can be written and read back. The result
    depends on the counts of words alone, not on the order of `texts`. Little text may give fewer ids than
    `vocab_size`.

    Raises:
        UserError: `vocab_size` has no room for all bytes.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise UserError(f"vocab_size ({vocab_size}) must be at least {MIN_VOCAB_SIZE}: 256 bytes, end-of-text token")
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = _BYTE_LEVEL
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(itertools.chain.from_iterable(map(cut_endless_words, texts)), trainer)
    return Tokenizer(inner)


def train_unigram(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn a Unigram vocabulary (Kudo 2018, arXiv:1804.10959) over bytes, with GPT-2's pre-token pattern.

    The trainer is that of `sentencepiece`: the one of `tokenizers` sums in the order of a hash map seeded anew in
    every process, and never gave the same file twice.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise UserError(f"vocab_size ({vocab_size}) must be at least {MIN_VOCAB_SIZE}: 256 bytes, end-of-text token")
    words = count_words(texts)
    alphabet = set(_BYTE_LEVEL.alphabet())
    pieces = _learn_pieces(words, vocab_size - len(alphabet.difference(*words))) if words else []
    lowest = min((score for _, score in pieces), default=0.0)
    pieces += [(byte, lowest - _UNSEEN) for byte in sorted(alphabet.difference(piece for piece, _ in pieces))]

    inner = tokenizers.Tokenizer(models.Unigram([(END_OF_TEXT, 0.0), *pieces]))
    inner.pre_tokenizer, inner.decoder = _BYTE_LEVEL, decoders.ByteLevel()
    inner.add_special_tokens([END_OF_TEXT])  # GPT-2's pattern cuts its letters apart: no text can match it
    return Tokenizer(inner)


def count_words(texts: Iterable[str]) -> Counter[str]:
    """How often each pre-token occurs, of `cut_endless_words`; each distinct run between spaces is cut only once."""
    runs: Counter[str] = Counter()
    for text in itertools.chain.from_iterable(map(cut_endless_words, texts)):
        first, *rest = text.split(" ")
        runs[first] += 1
        runs.update([" " + word for word in rest])
    words: Counter[str] = Counter()
    for run, count in runs.items():
        for word, _ in _BYTE_LEVEL.pre_tokenize_str(run):
            words[word] += count
    return words


def cut_endless_words(text: str) -> Iterator[str]:
    """The text in parts, so that no pre-token has more than 1,000 bytes: an endless one is cut; of ASCII, as an
    address or code, it is left out.

    Words are pre-tokens and not runs between spaces: a story in Chinese or Japanese has no space, but its commas and
    full stops end pre-tokens.
    """
    start = 0
    if max(map(len, text.split(" "))) > _PART_CHARS:  # no pre-token of a text without white space in a row is longer
        for word, (first, end) in _BYTE_LEVEL.pre_tokenize_str(text):
            if len(word) <= _LONGEST_WORD:
                continue
            is_code = text[first:end].isascii()
            for cut in (first,) if is_code else range(first + _PART_CHARS, end, _PART_CHARS):
                yield text[start:cut]
                start = cut
            start = end if is_code else start
    yield text[start:]


def _learn_pieces(words: Counter[str], size: int) -> list[Piece]:
    """At most `size - 1` pieces that `words` are made of, all their characters among them; the likeliest first."""
    sentencepiece = _sentencepiece()
    learned = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=map(_training_row, *zip(*sorted(words.items()))),
        input_format="tsv",
        model_writer=learned,
        model_type="unigram",
        vocab_size=size,
        hard_vocab_limit=False,
        character_coverage=1.0,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        split_by_unicode_script=False,  # of the stand-ins for bytes, it means nothing
        split_by_number=False,
        max_sentence_length=8 * _LONGEST_WORD,  # bytes: a stand-in has two, and a word may be there twice
        bos_id=-1,
        eos_id=-1,
        num_threads=1,  # sums in another order are other sums
        minloglevel=2,
    )
    model = sentencepiece.SentencePieceProcessor(model_proto=learned.getvalue())
    numbers = range(1, model.get_piece_size())  # 0 is what is unknown
    return [(model.id_to_piece(number).replace(_SPACE, _SPACE_BYTE), model.get_score(number)) for number in numbers]


def _training_row(word: str, count: int) -> str:
    """A word and twice its count, as SentencePiece reads them.

    Only what occurs twice in different rows becomes a candidate, whatever the counts: a frequent word is written
    twice in its row, and cut apart again at its space. Otherwise no whole word would be learned (3.43 bytes a token
    instead of 4.09 on TinyStories with 4,096 entries).
    """
    word = word.replace(_SPACE_BYTE, " ")
    return f"{word}{word}\t{count}" if word.startswith(" ") and count > 1 else f"{word}\t{2 * count}"


def _sentencepiece() -> Any:
    try:
        import sentencepiece
    except ImportError as error:
        raise UserError("a Unigram tokenizer needs the package sentencepiece: pip install it, or use bpe") from error
    return sentencepiece
