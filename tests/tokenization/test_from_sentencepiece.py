"""SentencePiece models as `tokenizer.json`: the ids of the real package, and every text that it has comes back."""

import re
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

DEFAULTS = {"normalization_rule_name": "nmt_nfkc", "byte_fallback": False, "remove_extra_whitespaces": True}
"""Those of the package, but for sizes."""
NORMALISED = st.text() | st.lists(
    st.sampled_from(
        ["e", "\u0301", "\u0323", " ", "  ", "\u00a8", "A", "\n", "\t", "ﬁ", "が", "か\u3099", "½", "™", "Å"]
    )
).map("".join)


@pytest.fixture(
    scope="module",
    params=[
        ("unigram", {}),
        ("bpe", {}),
        ("unigram", {"add_dummy_prefix": False}),
        ("bpe", {"add_dummy_prefix": False}),
        ("unigram", {"split_by_whitespace": False}),
        ("unigram", {"eos_piece": END_OF_TEXT}),
        ("unigram", DEFAULTS),
        ("bpe", DEFAULTS),
        ("unigram", {**DEFAULTS, "normalization_rule_name": "nfkc_cf", "remove_extra_whitespaces": False}),
        ("bpe", {**DEFAULTS, "normalization_rule_name": "identity", "remove_extra_whitespaces": False}),
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
    written = both[0].writable(text)  # all of it, with byte fallback and without a normaliser
    assert both[0].encode(written) == both[1].encode(written)
    assert both[0].encode_batch([written]).to_pylist() == [both[1].encode(written)]
    assert both[0].decode(both[0].encode(written)) == written
    if not both[0].unknown(both[0].normalised(text)):
        assert both[0].encode(text) == both[1].encode(text)


@settings(deadline=None, max_examples=300)
@given(text=NORMALISED.map(lambda text: text.replace("\u2581", "")))
@pytest.mark.parametrize("rule", ["nmt_nfkc", "nfkc", "nmt_nfkc_cf"])
@pytest.mark.parametrize("joins", [True, False])
def test_text_is_normalised_as_by_sentencepiece(rule: str, joins: bool, text: str) -> None:
    changes = {**DEFAULTS, "normalization_rule_name": rule, "remove_extra_whitespaces": joins}
    tokenizer = from_model("unigram", **changes)
    model = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model("unigram", **changes))
    assert tokenizer.normaliser is not None
    assert tokenizer.normaliser(text) == model.normalize(text)[1:].replace("\u2581", " ")
    settled = tokenizer.normalised(text)
    assert tokenizer.normaliser(settled) == settled
    written = tokenizer.writable(text)
    assert tokenizer.encode(written) == model.encode(written)


def test_characters_without_a_piece_are_named() -> None:
    tokenizer = from_model("unigram", **DEFAULTS)
    assert tokenizer.unknown(tokenizer.normalised("Lily日ﬁ 本日 ~")) == ["日", "本", "~"]
    assert tokenizer.writable(" ﬁne  日 day") == "fine day"
    assert not tokenizer.keeps_every_text and from_model("unigram").keeps_every_text
    assert from_model("unigram").unknown("日本") == []


def test_the_file_says_its_normalisation_and_opens_again(tmp_path: Path) -> None:
    made = from_model("bpe", **DEFAULTS)
    made.save(tmp_path / "tokenizer.json")
    opened = loading.open_tokenizer(str(tmp_path))
    assert opened.sha256 == made.sha256 and opened.normaliser == made.normaliser
    foreign = made.to_json().replace('" {2,}"', '" {3,}"')
    assert foreign != made.to_json()
    with pytest.raises(UserError, match=r"its normaliser \(Sequence\) changes text"):
        Tokenizer.from_json(foreign, must_keep_text=True)


@settings(deadline=None, max_examples=100)
@given(text=TEXTS.map(lambda text: text.replace("\u2581", "")))
@pytest.mark.parametrize("rule", ["identity", "nmt_nfkc"])
def test_what_has_no_piece_is_unknown_as_in_sentencepiece_but_twice_around_a_mark(rule: str, text: str) -> None:
    changes = {**DEFAULTS, "normalization_rule_name": rule, "remove_extra_whitespaces": False}
    model = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model("unigram", **changes))
    tokenizer, unknown = from_model("unigram", **changes), model.unk_id()
    ids, expected = tokenizer.encode(text), model.encode(text)
    if not re.search(r"<s>|</s>|<unk>|<0x[0-9A-F]{2}>", tokenizer.normalised(text)):
        assert ids == expected or (not ids and not tokenizer.normalised(text))
    else:
        assert without_repeats(ids, unknown) == without_repeats(expected, unknown)


def without_repeats(ids: list[int], unknown: int) -> list[int]:
    return [one for place, one in enumerate(ids) if one != unknown or ids[place - 1 : place] != [unknown]]


def test_a_text_of_nothing_but_removed_characters_is_empty_and_names_of_marks_are_unknown_letters() -> None:
    changes = {**DEFAULTS, "remove_extra_whitespaces": False}
    model = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model("unigram", **changes))
    tokenizer = from_model("unigram", **changes)
    (space,) = model.encode("\x07")
    assert (tokenizer.encode("\x07"), model.id_to_piece(space)) == ([], "\u2581")
    assert tokenizer.unknown(tokenizer.normalised("</s>")) and tokenizer.writable("</s>") == "s"
    assert len(tokenizer.encode("</s>")) == len(model.encode("</s>")) + 1


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
        ({"model_type": "char"}, "neither a Unigram nor a BPE model"),
        ({"treat_whitespace_as_suffix": True}, "puts spaces at the end of words"),
        ({"user_defined_symbols": "<sep>"}, "has user-defined symbols"),
    ],
)
def test_a_model_that_changes_text_is_refused(tmp_path: Path, changes: dict[str, Any], why: str) -> None:
    (tmp_path / "lossy.model").write_bytes(sentencepiece_model(**{"kind": "unigram", **changes}))
    with pytest.raises(UserError, match=rf"lossy.model: .*{why}.*; train it with SentencePiece's defaults"):
        loading.open_tokenizer(str(tmp_path / "lossy.model"))


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_a_broken_model_is_refused(data: st.DataObject) -> None:
    whole = sentencepiece_model("unigram", **data.draw(st.sampled_from([{}, DEFAULTS])))
    cut = data.draw(st.integers(0, len(whole) - 1))
    flipped = bytearray(whole[:cut] if data.draw(st.booleans()) else whole)
    for place in data.draw(st.lists(st.integers(0, max(0, len(flipped) - 1)), max_size=3)):
        if flipped:
            flipped[place] ^= 0xFF
    try:
        Tokenizer.from_json(loading.with_end_of_text(convert(bytes(flipped), "x.model")), must_keep_text=True)
    except UserError as error:
        assert "\n" not in str(error)
