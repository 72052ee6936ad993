"""Where a tokenizer comes from: learned from stories, or brought along by the user.

In: stories and a size, or what `--tokenizer` names: a `tokenizer.json`, a folder with one, a SentencePiece
`.model`, `gpt2`, `hub:NAME`. Out: a `Tokenizer` that keeps every text and has an end mark. Called by `stories`
(training) and by the options of the pipeline; from there on only `tokenizer.json` is known.
"""

import contextlib
import io
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from slm_ray.errors import UserError
from slm_ray.tokenization.from_sentencepiece import convert
from slm_ray.tokenization.tokenizer import END_OF_TEXT, MIN_VOCAB_SIZE, Tokenizer

TOKENIZER_MODELS = ("bpe", "unigram")
GPT2 = "openai-community/gpt2"
HUB_PREFIX = "hub:"
HUB_ANSWER_S = 4.0
_TOKENIZER_FILE = "tokenizer.json"
_LONGEST_WORD = 1000  # bytes, of a word to learn from: beyond it there is nothing to learn
_SPACE_BYTE = "\u0120"  # how byte-level tokenizers write a space
_SPACE = "\u2581"  # how SentencePiece does
_UNSEEN = 10.0  # how much less likely, in nats, than the rarest piece a byte is that no story has

Piece = tuple[str, float]
"""An entry of a Unigram vocabulary and the logarithm of its probability."""


def train(texts: Iterable[str], vocab_size: int, model: str = "bpe") -> Tokenizer:
    """Learn a byte-level tokenizer of one of `TOKENIZER_MODELS`, `<|endoftext|>` as id 0.

    Any text can be written and read back, and the result depends on the counts of words alone. Texts with too
    few different words give fewer than `vocab_size` entries.

    Raises:
        UserError: `vocab_size` has no room for all bytes.
    """
    if model == "unigram":
        return train_unigram(texts, vocab_size)
    return Tokenizer.train(map(_without_endless_words, texts), vocab_size)


def train_unigram(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn a Unigram vocabulary (Kudo 2018, arXiv:1804.10959) over bytes, with GPT-2's pre-token pattern.

    The trainer is that of `sentencepiece`: the one of `tokenizers` sums in the order of a hash map seeded anew in
    every process, and never gave the same file twice.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise UserError(f"vocab_size ({vocab_size}) must be at least {MIN_VOCAB_SIZE}: 256 bytes, end mark")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = count_words(texts, byte_level)
    alphabet = set(byte_level.alphabet())
    pieces = _learn_pieces(words, vocab_size - len(alphabet.difference(*words))) if words else []
    lowest = min((score for _, score in pieces), default=0.0)
    pieces += [(byte, lowest - _UNSEEN) for byte in sorted(alphabet.difference(piece for piece, _ in pieces))]

    inner = tokenizers.Tokenizer(models.Unigram([(END_OF_TEXT, 0.0), *pieces]))
    inner.pre_tokenizer, inner.decoder = byte_level, decoders.ByteLevel()
    inner.add_special_tokens([END_OF_TEXT])  # GPT-2's pattern cuts its letters apart: no text can match it
    return Tokenizer(inner)


def count_words(texts: Iterable[str], pre_tokenizer: Any) -> Counter[str]:
    """How often each pre-token of at most 1,000 bytes occurs; each distinct run between spaces is cut only once."""
    runs: Counter[str] = Counter()
    for text in texts:
        first, *rest = text.split(" ")
        runs[first] += 1
        runs.update([" " + word for word in rest])
    words: Counter[str] = Counter()
    for run, count in runs.items():
        for word, _ in pre_tokenizer.pre_tokenize_str(run):
            if len(word) <= _LONGEST_WORD:
                words[word] += count
    return words


def _without_endless_words(text: str) -> str:
    """BPE's trainer takes minutes for a word of a million characters."""
    if len(text) <= _LONGEST_WORD:
        return text
    return " ".join(word for word in text.split(" ") if len(word) <= _LONGEST_WORD)


def open_tokenizer(where: str) -> Tokenizer:
    """The tokenizer that `--tokenizer` names: a file, a folder, a `.model`, `gpt2`, or `hub:NAME[@REVISION]`.

    A file without the special token `<|endoftext|>` gets it as its next id; other special tokens it may have
    keep their ids and are never used.

    Raises:
        UserError: it cannot be had or read, does not keep every text, or cannot have an end mark.
    """
    path = _found(where)
    content = _read(path)
    text = convert(content, where) if path.suffix == ".model" else content.decode("utf-8", errors="replace")
    return Tokenizer.from_json(with_end_mark(text, where), where, must_keep_text=True)


def _found(where: str) -> Path:
    """The file that is meant."""
    if where.startswith(HUB_PREFIX):
        return _download(where.removeprefix(HUB_PREFIX))
    try:
        path = Path(where).expanduser()
        if where == "gpt2" and not path.exists():
            return _download(GPT2)
        return path / _TOKENIZER_FILE if path.is_dir() else path
    except (OSError, RuntimeError) as error:  # a name that is too long, ~name of nobody
        raise UserError(f"cannot read the tokenizer {where}: {error}") from error


def with_end_mark(text: str, name: str = "tokenizer") -> str:
    """A `tokenizer.json` that has `<|endoftext|>` as a special token; unchanged if it has.

    An entry of that name keeps its id and becomes special; otherwise the next free id is taken. A special token
    of another name (`</s>`) is left alone: the end mark has one name in every data set.

    Raises:
        UserError: it is no tokenizer file, or its ids have holes where the end mark would go.
    """
    try:
        inner = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the Rust side raises plain Exception
        raise UserError(f"{name} is not a tokenizer.json of the `tokenizers` package: {error}") from error
    config = json.loads(text)
    named = [token for token in config.get("added_tokens") or [] if token["content"] == END_OF_TEXT]
    if named:
        named[0]["special"] = True
        return json.dumps(config, ensure_ascii=False)
    taken = inner.get_vocab(with_added_tokens=True)
    inner.add_special_tokens([END_OF_TEXT])
    if END_OF_TEXT not in taken and inner.token_to_id(END_OF_TEXT) in taken.values():
        raise UserError(
            f"cannot add {END_OF_TEXT} to {name}: its ids have holes (they reach {max(taken.values())}, but it has "
            f"{len(taken)} entries); number them from 0 without holes, or leave out --tokenizer to train one"
        )
    return str(inner.to_str())


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


def _download(name: str) -> Path:
    """The `tokenizer.json` of a model of the hub; without an answer, the copy that the hub's client keeps."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    repository, _, revision = name.partition("@")
    file: dict[str, Any] = {"repo_id": repository, "filename": _TOKENIZER_FILE, "revision": revision or None}
    try:
        get_hf_file_metadata(hf_hub_url(**file), timeout=HUB_ANSWER_S)  # one question; the download asks for 24 s
        return Path(hf_hub_download(**file))
    except Exception as error:  # every layer below has its own family of exceptions
        with contextlib.suppress(Exception):
            return Path(hf_hub_download(**file, local_files_only=True))
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"cannot get the tokenizer {HUB_PREFIX}{name} ({why}): give a file, try again with a network, "
            "or leave out --tokenizer to train one"
        ) from error


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(
            f"cannot read the tokenizer {path}: {error.strerror}; give a tokenizer.json, a folder that holds one, "
            "a SentencePiece .model, gpt2 or hub:NAME"
        ) from error
