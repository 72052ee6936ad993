"""A trained Unigram in SentencePiece's own format: the same ids, and every text comes back."""

import functools
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from slm_ray.corpus.grammar import sample_stories
from slm_ray.errors import UserError
from slm_ray.tokenization.loading import open_tokenizer
from slm_ray.tokenization.to_sentencepiece import MODEL_FILE, VOCAB_FILE, charsmap, sentencepiece_files
from slm_ray.tokenization.tokenizer import END_OF_TEXT, Tokenizer
from slm_ray.tokenization.training import train_bpe, train_unigram
from tests.support.sentencepiece_models import TEXTS


@functools.cache
def both() -> tuple[Tokenizer, sentencepiece.SentencePieceProcessor]:
    trained = train_unigram(sample_stories(0, 120), 500)
    return trained, sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_files(trained)[MODEL_FILE])


def test_stories_have_the_same_ids() -> None:
    trained, model = both()
    for story in sample_stories(200, 400):
        assert model.encode(story) == trained.encode(story)
    assert (model.eos_id(), model.unk_id(), model.get_piece_size()) == (trained.eos_id, 500, 501)
    assert model.encode(f"a{END_OF_TEXT}b") == trained.encode(f"a{END_OF_TEXT}b")


@settings(deadline=None, max_examples=100)
@given(text=TEXTS.map(lambda text: text.replace("\0", "")))
def test_every_text_comes_back(text: str) -> None:
    trained, model = both()
    assert model.decode(model.encode(text)) == text == model.decode(trained.encode(text))
    assert model.unk_id() not in model.encode(text)


def test_the_vocabulary_names_each_piece_with_its_score() -> None:
    lines = sentencepiece_files(both()[0])[VOCAB_FILE].decode().split("\n")
    model = both()[1]
    assert len(lines) == model.get_piece_size() + 1 and lines[-1] == ""
    for number, line in enumerate(lines[:-1]):
        piece, score = line.split("\t")
        assert piece == model.id_to_piece(number) and float(score) == pytest.approx(model.get_score(number), rel=1e-5)


def test_bpe_has_no_such_file() -> None:
    assert sentencepiece_files(train_bpe(sample_stories(0, 20), 300)) == {}


@given(st.dictionaries(st.binary(min_size=1, max_size=4).map(lambda key: key.replace(b"\0", b"x")), st.just(b"x")))
def test_rules_of_any_bytes_are_found_again(rules: dict[bytes, bytes]) -> None:
    from slm_ray.tokenization.normaliser import Normaliser

    written = {key.decode("latin-1").encode(): b"<%d>" % number for number, key in enumerate(rules)}
    normaliser = Normaliser(charsmap(written), joins_spaces=False) if written else None
    for key, text in written.items():
        assert normaliser is not None and normaliser(key.decode()) == text.decode()


def test_the_model_that_was_written_is_not_taken_back_but_what_stands_beside_it(tmp_path: Path) -> None:
    trained, _ = both()
    (tmp_path / MODEL_FILE).write_bytes(sentencepiece_files(trained)[MODEL_FILE])
    (tmp_path / "tokenizer.json").write_text(trained.to_json(), encoding="utf-8")
    with pytest.raises(UserError, match=r"Then name the tokenizer.json beside it"):
        open_tokenizer(str(tmp_path / MODEL_FILE))
    assert open_tokenizer(str(tmp_path / "tokenizer.json")).encode("Once upon") == trained.encode("Once upon")
