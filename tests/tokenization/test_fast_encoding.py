"""Each kind of tokenizer that `gigatoken` may encode gives the ids of `tokenizers` of any text; no other reaches it."""

import copy
import json
import logging
import sys
import threading
from functools import cache
from pathlib import Path
from typing import Any

import gigatoken
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from slm_ray.corpus.grammar import sample_stories
from slm_ray.tokenization import fast_encoding
from slm_ray.tokenization.fast_encoding import CHECKED, FastEncoder, as_strings, is_known
from slm_ray.tokenization.tokenizer import END_OF_TEXT, Tokenizer
from slm_ray.tokenization.training import train
from tests.support.sentencepiece_models import from_model

STORIES = [str(story) for story in sample_stories(0, 150)]
FOREIGN = [
    "caf\u00e9 na\u00efve \u0436\u0438\u0437\u043d\u044c \u65e5\u672c\u8a9e 12345 \u00bd --- ...",
    "\U0001f600\U0001f468\u200d\U0001f469",
] * 3
PIECES = st.sampled_from(
    [
        *("the", " the", "The", "Lily", "didn't", "DON'T", "'s", "'S", "'x", '."', "aaa", "7", "12345", "\u00bd"),
        *("\u2167", "caf\u00e9", "cafe\u0301", "\u65e5\u672c\u8a9e", "\ud55c\uad6d", "\u0939\u093f\u0928\u094d"),
        *("\u0e44\u0e17\u0e22", "\U0001f600", "\U0001f468\u200d\U0001f469", "\U0001f1e9\U0001f1ea"),
        *(" ", "  ", "\n", "\r\n", "\r", "\t", " \n\n ", "\u00a0", "\u3000", "\u2028", "\u0085", "\x1c", "\x0b"),
        *("\x00", "\x7f", "\u0301", "\u200d", "\u200b", "\ufeff", "\ufffd", "\U0010ffff", "\u2581", "\u0120"),
        *("\u010a", "_", "--", "\u2014", "\u2026", "\u017f", "\u01c5"),
        *("<", "<s>", "</s>", "<unk>", "<0x41>", "<|", "|>", END_OF_TEXT),
    ]
)
MIXED = st.lists(PIECES, max_size=14).map("".join)
HUGE = st.builds(lambda piece, times: piece * times, PIECES, st.integers(0, 3000))
TEXTS = st.lists(st.text() | MIXED | HUGE, max_size=6)


def byte_level(pre: Any, **options: Any) -> str:
    """A byte-level BPE as the package itself makes it."""
    inner = tokenizers.Tokenizer(models.BPE(**options))
    inner.pre_tokenizer, inner.decoder = pre, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=alphabet, special_tokens=[END_OF_TEXT], show_progress=False
    )
    inner.train_from_iterator(STORIES + FOREIGN, trainer)
    return str(inner.to_str())


def cut_by(pattern: str) -> Any:
    cut = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def gpt2_words() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


KINDS = {
    "ours": lambda: train(STORIES + FOREIGN, 600).to_json(),
    "bytes alone": lambda: train(STORIES[:2], 257).to_json(),
    "GPT-2": lambda: byte_level(gpt2_words()),
    "GPT-2, whole words first": lambda: byte_level(gpt2_words(), ignore_merges=True),
    "Llama 3": lambda: byte_level(cut_by(fast_encoding.PATTERNS["Llama 3"]), ignore_merges=True),
    "Qwen 2": lambda: byte_level(cut_by(fast_encoding.PATTERNS["Qwen 2"])),
    "SentencePiece": lambda: from_model("bpe").to_json(),
    "SentencePiece, no space before": lambda: from_model("bpe", add_dummy_prefix=False).to_json(),
    "SentencePiece, defaults with bytes": lambda: from_model(
        "bpe", normalization_rule_name="nmt_nfkc", remove_extra_whitespaces=True
    ).to_json(),
}


@cache
def opened(kind: str) -> Tokenizer:
    return Tokenizer.from_json(KINDS[kind]())


@pytest.mark.parametrize("kind", KINDS)
@given(texts=TEXTS)
@settings(max_examples=40, deadline=None)
def test_ids_are_those_of_the_other_package(kind, texts):
    tokenizer = opened(kind)
    assert tokenizer.encode_batch(texts).to_pylist() == [tokenizer.encode(text) for text in texts]
    assert tokenizer.fast is not None and tokenizer.fast.is_used


@pytest.mark.parametrize("kind", KINDS)
def test_whole_stories_and_all_that_is_checked_have_the_same_ids(kind):
    tokenizer = opened(kind)
    texts = [*CHECKED, *STORIES, *(text.replace(" ", "\n") for text in STORIES), " ".join(STORIES)]
    assert tokenizer.encode_batch(texts).to_pylist() == [tokenizer.encode(text) for text in texts]
    assert tokenizer.fast is not None and tokenizer.fast.is_used


def test_a_part_of_an_array_is_encoded_alone():
    tokenizer = opened("ours")
    part = as_strings(STORIES[:9])[2:7]
    assert tokenizer.encode_batch(part).to_pylist() == [tokenizer.encode(text) for text in STORIES[2:7]]
    assert tokenizer.encode_batch(part[:0]).to_pylist() == []


def changed(config: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    config = copy.deepcopy(config)
    *parents, last = path.split("/")
    place = config
    for name in parents:
        place = place[name]
    place[last] = value
    return config


OTHERS = {
    "ours": [
        ("normalizer", {"type": "NFC"}),
        ("model/dropout", 0.1),
        ("model/end_of_word_suffix", "</w>"),
        ("model/continuing_subword_prefix", "##"),
        ("model/type", "WordPiece"),
        ("pre_tokenizer/add_prefix_space", True),
        ("pre_tokenizer/use_regex", False),
        ("pre_tokenizer", None),
        ("pre_tokenizer", {"type": "Sequence", "pretokenizers": []}),
        ("added_tokens", [{"id": 0, "content": "the", "special": False}]),
        ("model/vocab", {"a": 0}),
    ],
    "SentencePiece": [
        ("pre_tokenizer", {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always"}),
        ("normalizer", {"type": "Prepend", "prepend": "\u2581"}),
        ("model/ignore_merges", True),
        ("model/vocab", {"a": 0}),
    ],
    "Llama 3": [
        ("pre_tokenizer/pretokenizers/0/pattern", {"Regex": r"\w+|\s+"}),
        ("pre_tokenizer/pretokenizers/0/pattern", {"String": " "}),
        ("pre_tokenizer/pretokenizers/0/behavior", "Removed"),
        ("pre_tokenizer/pretokenizers/0/invert", True),
        ("pre_tokenizer/pretokenizers/1/use_regex", True),
    ],
}


@pytest.mark.parametrize(("kind", "path", "value"), [(kind, *other) for kind, them in OTHERS.items() for other in them])
def test_another_kind_is_not_known(kind, path, value):
    config = json.loads(KINDS[kind]())
    assert is_known(config)
    if "/0/" in path or "/1/" in path:
        number = int(path.split("/")[2])
        config["pre_tokenizer"]["pretokenizers"][number][path.split("/")[3]] = value
    else:
        config = changed(config, path, value)
    assert not is_known(config)


def test_unigram_is_encoded_by_the_other_package():
    tokenizer = train(STORIES, 400, "unigram")
    assert tokenizer.fast is None
    assert tokenizer.encode_batch(STORIES[:3]).to_pylist() == [tokenizer.encode(text) for text in STORIES[:3]]


def test_one_that_differs_is_used_no_more_and_that_is_said_once(monkeypatch, caplog):
    other = gigatoken.Tokenizer.from_json(json.dumps({**json.loads(opened("GPT-2").to_json()), "added_tokens": []}))
    monkeypatch.setattr(gigatoken.Tokenizer, "from_json", lambda _text: other)
    tokenizer = Tokenizer.from_json(KINDS["ours"]())
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert tokenizer.encode_batch(STORIES[:2]).to_pylist() == [tokenizer.encode(text) for text in STORIES[:2]]
    assert "gives other ids than tokenizers, for example of" in tokenizer.fast.problem
    assert [record.message for record in caplog.records] == [tokenizer.fast.problem]
    assert not tokenizer.fast.is_used


@pytest.mark.parametrize("moment", ["load", "encode"])
def test_one_that_fails_is_used_no_more(monkeypatch, moment):
    class PanicException(BaseException):
        """As a panic of Rust arrives in Python."""

    class Failing:
        def encode_batch(self, *_texts: Any, **_options: Any) -> None:
            raise PanicException("index out of bounds")

    def load(_text: str) -> Failing:
        if moment == "load":
            raise ValueError("no such kind")
        return Failing()

    monkeypatch.setattr(gigatoken.Tokenizer, "from_json", load)
    tokenizer = Tokenizer.from_json(KINDS["ours"]())
    assert tokenizer.encode_batch(STORIES[:2]).to_pylist() == [tokenizer.encode(text) for text in STORIES[:2]]
    assert ("no such kind" if moment == "load" else "index out of bounds") in tokenizer.fast.problem


def test_where_the_package_is_absent_nothing_is_said(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    tokenizer = Tokenizer.from_json(KINDS["ours"]())
    assert tokenizer.encode_batch(STORIES[:2]).to_pylist() == [tokenizer.encode(text) for text in STORIES[:2]]
    assert (tokenizer.fast.problem, caplog.records, tokenizer.fast.is_used) == ("", [], False)


def test_an_interrupt_is_no_failure(monkeypatch):
    def interrupted(_text: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(gigatoken.Tokenizer, "from_json", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Tokenizer.from_json(KINDS["ours"]()).encode_batch(STORIES)


def test_its_memory_of_words_begins_anew(monkeypatch):
    loads = []
    load = gigatoken.Tokenizer.from_json
    monkeypatch.setattr(gigatoken.Tokenizer, "from_json", lambda text: loads.append(1) or load(text))
    monkeypatch.setattr(fast_encoding, "MAX_NEW_BYTES", 2000)
    tokenizer = Tokenizer.from_json(KINDS["ours"]())
    for story in STORIES[:20]:
        assert tokenizer.encode_batch([story]).to_pylist() == [tokenizer.encode(story)]
    assert 3 < len(loads) < 20


def n_threads() -> int:
    return len([*Path("/proc/self/task").iterdir()]) if sys.platform == "linux" else 0


def test_it_starts_no_threads_and_may_be_used_by_several():
    inner = tokenizers.Tokenizer.from_str(KINDS["ours"]())
    inner.encode_special_tokens = True
    encoder = FastEncoder(inner)
    texts = as_strings(STORIES)
    before = n_threads()
    first = encoder.encode(texts)
    assert first is not None
    assert n_threads() == before
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(encoder.encode(texts))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all((ids == first[0]).all() and (ends == first[1]).all() for ids, ends in found)
