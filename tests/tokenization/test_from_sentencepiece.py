"""SentencePiece models as `tokenizer.json`: the ids of the real package, and every text comes back."""

from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from slm_ray.errors import UserError
from slm_ray.preparation.cleaning import clean_story
from slm_ray.tokenization import loading
from slm_ray.tokenization.from_sentencepiece import convert
from slm_ray.tokenization.tokenizer import END_OF_TEXT, Tokenizer
from tests.support.sentencepiece_models import STORIES, TEXTS, from_model, sentencepiece_model


@pytest.fixture(
    scope="module",
    params=[
        ("unigram", {}),
        ("bpe", {}),
        ("unigram", {"add_dummy_prefix": False}),
        ("bpe", {"add_dummy_prefix": False}),
        ("unigram", {"split_by_whitespace": False}),
        ("unigram", {"eos_piece": END_OF_TEXT}),
    ],
    ids=str,
)
def both(request: pytest.FixtureRequest) -> tuple[Tokenizer, sentencepiece.SentencePieceProcessor]:
    kind, changes = request.param
    model = sentencepiece_model(kind, **changes)
    return from_model(kind, **changes), sentencepiece.SentencePieceProcessor(model_proto=model)


@settings(deadline=None, max_examples=50)
@given(text=TEXTS.map(lambda text: text.replace("\u2581", "")) | st.sampled_from(STORIES))
def test_ids_are_those_of_sentencepiece(
    both: tuple[Tokenizer, sentencepiece.SentencePieceProcessor], text: str
) -> None:
    assert both[0].encode(text) == both[1].encode(text)


@settings(deadline=None, max_examples=25)
@given(text=TEXTS.map(lambda text: clean_story(text.replace("\u2581", ""))))
def test_a_model_that_removes_extra_spaces_has_none_to_remove_from_clean_stories(text: str) -> None:
    model = sentencepiece_model("unigram", remove_extra_whitespaces=True)
    tokenizer = from_model("unigram", remove_extra_whitespaces=True)
    assert tokenizer.encode(text) == sentencepiece.SentencePieceProcessor(model_proto=model).encode(text)
    assert tokenizer.decode(tokenizer.encode(f"  {text}  ")) == f"  {text}  "


def test_a_mark_of_sentencepiece_that_is_the_end_mark_keeps_its_id() -> None:
    assert from_model("unigram", eos_piece=END_OF_TEXT).eos_id == 2
    assert from_model("unigram").eos_id == 500


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"normalization_rule_name": "nmt_nfkc"}, r"its normaliser \(nmt_nfkc\) changes text"),
        ({"byte_fallback": False}, "loses every character that it has no piece for"),
        ({"model_type": "char"}, "neither a Unigram nor a BPE model"),
        ({"treat_whitespace_as_suffix": True}, "puts spaces at the end of words"),
        ({"user_defined_symbols": "<sep>"}, "has user-defined symbols"),
    ],
)
def test_a_model_that_changes_text_is_refused(tmp_path: Path, changes: dict[str, Any], why: str) -> None:
    (tmp_path / "lossy.model").write_bytes(sentencepiece_model(**{"kind": "unigram", **changes}))
    with pytest.raises(UserError, match=rf"lossy.model: .*{why}.*; train it with --normalization_rule_name=identity"):
        loading.open_tokenizer(str(tmp_path / "lossy.model"))


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_a_broken_model_is_refused(data: st.DataObject) -> None:
    whole = sentencepiece_model("unigram")
    cut = data.draw(st.integers(0, len(whole) - 1))
    flipped = bytearray(whole[:cut] if data.draw(st.booleans()) else whole)
    for place in data.draw(st.lists(st.integers(0, max(0, len(flipped) - 1)), max_size=3)):
        if flipped:
            flipped[place] ^= 0xFF
    try:
        Tokenizer.from_json(loading.with_end_of_text(convert(bytes(flipped), "x.model")), must_keep_text=True)
    except UserError as error:
        assert "\n" not in str(error)
