"""Words encoded once and gathered are the ids of the whole text, for any text."""

import threading

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slm_ray.tokenization import word_cache
from slm_ray.tokenization.tokenizer import Tokenizer
from slm_ray.tokenization.training import train_bpe
from slm_ray.tokenization.word_cache import are_apart, cut_words

TEXTS = st.lists(
    st.text(st.sampled_from("ab'sé 1!\n\t\u00a0😀") | st.characters(exclude_categories=["Cs"]), max_size=30)
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(["The cat's dog ran 12 miles! It isn't far, is it? a b as bs sa ab ba"] * 3, 400)


def test_words_keep_the_space_before_them():
    words = cut_words(pa.array(["a b b", "", " b", "b"], pa.large_string()))
    assert words.to_pylist() == [["a", " b", " b"], [], [" b"], ["b"]]
    assert len(words.values.dictionary) == 3


@given(TEXTS, st.integers(0, 3))
def test_the_words_of_a_text_joined_are_the_text(texts, skipped):
    array = pa.array(texts, pa.large_string()).slice(skipped)
    assert ["".join(words) for words in cut_words(array).to_pylist()] == texts[skipped:]


@pytest.mark.parametrize(
    ("text", "apart"),
    [
        ("a b", True),
        ("a\nb c", True),
        (" a", True),
        ("a  b", False),
        ("a \nb", False),
        ("a\u00a0 b", False),
        ("a ", False),
    ],
)
def test_a_space_beside_other_white_space_is_no_border(text, apart):
    assert are_apart(cut_words(pa.array([text], pa.large_string()))) is apart


@given(TEXTS)
def test_ids_are_those_of_each_text_by_itself(tokenizer, texts):
    assert tokenizer.encode_batch(texts).to_pylist() == [tokenizer.encode(text) for text in texts]


@given(TEXTS.map(lambda texts: [" ".join(text.split()) for text in texts]))
def test_ids_of_clean_texts_are_those_of_each_text_by_itself(tokenizer, texts):
    assert tokenizer.encode_batch(texts).to_pylist() == [tokenizer.encode(text) for text in texts]


def test_a_full_memo_begins_anew(tokenizer, monkeypatch):
    monkeypatch.setattr(word_cache, "MAX_WORDS", 3)
    fresh = Tokenizer.from_json(tokenizer.to_json())
    for text in ("the cat", "a dog ran far away", "the cat", "it is"):
        assert fresh.encode_batch([text]).to_pylist() == [fresh.encode(text)]


def test_threads_share_one_memo(tokenizer):
    fresh = Tokenizer.from_json(tokenizer.to_json())
    texts = [[f"word{thread} and number {row}" for row in range(50)] for thread in range(4)]
    found: dict[int, list[list[int]]] = {}

    def encode(thread: int) -> None:
        found[thread] = [ids for text in texts[thread] for ids in fresh.encode_batch([text]).to_pylist()]

    threads = [threading.Thread(target=encode, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(found[number] == [fresh.encode(text) for text in texts[number]] for number in range(4))
