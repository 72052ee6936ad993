"""Byte-level BPE with a true end-of-text token, and the fast batch encoder against the plain one."""

import json

import pyarrow as pa
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from slm_ray.errors import UserError
from slm_ray.storage import storage_path
from slm_ray.tokenization.tokenizer import END_OF_TEXT, EVERY_BYTE, Tokenizer, TokenizerError
from slm_ray.tokenization.training import train_bpe

STORIES = [
    "Once upon a time, there was a little girl named Lily. She didn't like the rain.",
    "Tom said, \"Let's play!\" They played until 7 o'clock. The end.",
    "The café was closed, but the dog was happy.",
] * 5

WORDS = st.sampled_from(["the", "Lily", "didn't", "7", "café", "…", "日本", "\u00a0", "\x1c", "\n", ""])
PROSE = st.lists(WORDS, max_size=12).map(" ".join)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(STORIES, vocab_size=400)


def test_the_end_mark_is_id_zero_and_special(tokenizer):
    assert tokenizer.eos_id == 0
    assert json.loads(tokenizer.to_json())["added_tokens"][0] == {
        "id": 0,
        "content": END_OF_TEXT,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }


@given(text=st.text() | PROSE)
def test_any_unicode_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(texts=st.lists(st.text() | PROSE, max_size=8))
def test_batch_ids_are_those_of_single_texts(tokenizer, texts):
    assert tokenizer.encode_batch(texts).to_pylist() == [tokenizer.encode(text) for text in texts]


@given(texts=st.lists(PROSE, min_size=1, max_size=8), start=st.integers(0, 3))
def test_batch_of_a_slice_of_an_array(tokenizer, texts, start):
    array = pa.array(texts, pa.string())[start:]
    assert tokenizer.encode_batch(array).to_pylist() == [tokenizer.encode(text) for text in texts[start:]]


def test_the_word_encoder_is_used_for_clean_stories(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "_inner", CountingInner(tokenizer._inner))
    tokenizer.encode_batch(STORIES)
    assert tokenizer._inner.encoded < len(set(" ".join(STORIES).split())) + len(STORIES) + 1


class CountingInner:
    """Passes batches on and counts the texts in them."""

    def __init__(self, inner):
        self.inner = inner
        self.encoded = 0

    def encode_batch_fast(self, texts, **options):
        self.encoded += len(texts)
        return self.inner.encode_batch_fast(texts, **options)


@pytest.mark.parametrize("text", [END_OF_TEXT, f"He said {END_OF_TEXT} twice.", f"{END_OF_TEXT}{END_OF_TEXT}"])
def test_the_letters_of_the_end_mark_are_not_the_end_mark(tokenizer, text):
    assert tokenizer.eos_id not in tokenizer.encode(text)
    assert tokenizer.eos_id not in tokenizer.encode_batch([text]).to_pylist()[0]
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_decoding_leaves_out_end_marks(tokenizer):
    assert tokenizer.decode([*tokenizer.encode("The end."), tokenizer.eos_id]) == "The end."


def test_pieces_show_token_borders(tokenizer):
    ids = tokenizer.encode("The dog was happy.")
    assert "".join(tokenizer.pieces(ids)) == "The dog was happy."
    assert len(tokenizer.pieces(ids)) == len(ids)


def test_training_does_not_depend_on_order():
    assert train_bpe(STORIES, 400).sha256 == train_bpe(STORIES[::-1], 400).sha256


def test_a_saved_tokenizer_is_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert (loaded.sha256, loaded.vocab_size, loaded.eos_id) == (tokenizer.sha256, tokenizer.vocab_size, 0)
    assert loaded.encode(END_OF_TEXT) == tokenizer.encode(END_OF_TEXT)


def test_a_tokenizer_without_end_mark_is_refused(tmp_path):
    plain = tokenizers.Tokenizer(tokenizers.models.BPE())
    plain.save(str(tmp_path / "plain.json"))
    with pytest.raises(UserError, match=r"plain.json has no special token <\|endoftext\|>"):
        Tokenizer.load(tmp_path / "plain.json")


def test_an_end_mark_that_is_plain_text_is_refused(tokenizer):
    config = json.loads(tokenizer.to_json())
    config["added_tokens"][0]["special"] = False
    with pytest.raises(UserError, match="no special token"):
        Tokenizer.from_json(json.dumps(config))


def test_files_that_are_no_tokenizer_are_refused(tmp_path):
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(UserError, match=r"x.json is not a tokenizer.json"):
        Tokenizer.load(tmp_path / "x.json")
    with pytest.raises(UserError, match="No such file"):
        Tokenizer.load(tmp_path / "absent.json")


def test_a_vocabulary_without_room_for_all_bytes_is_refused():
    with pytest.raises(UserError, match="at least 257"):
        train_bpe(STORIES, vocab_size=256)


@given(texts=st.lists(st.text() | PROSE, max_size=4))
def test_a_tokenizer_with_a_normalizer_is_encoded_plainly(texts):
    inner = tokenizers.Tokenizer.from_str(train_bpe(STORIES, 300).to_json())
    inner.normalizer = tokenizers.normalizers.Lowercase()
    tokenizer = Tokenizer.from_json(inner.to_str())
    assert tokenizer.encode_batch(texts).to_pylist() == [tokenizer.encode(text) for text in texts]


def test_the_probe_holds_every_byte_of_utf8():
    assert set(range(256)) - set(EVERY_BYTE.encode()) == {0xC0, 0xC1, *range(0xF5, 0x100)}


def test_a_tokenizer_that_keeps_text_is_taken(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "whole.json")
    assert Tokenizer.load(tmp_path / "whole.json", must_keep_text=True).sha256 == tokenizer.sha256


def without_some_bytes(config):
    """Learned without an initial alphabet: bytes it never saw are dropped without a word."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=[END_OF_TEXT], show_progress=False)
    inner.train_from_iterator(STORIES, trainer)
    return json.loads(inner.to_str())


def with_a_normalizer(config):
    return {**config, "normalizer": {"type": "NFKD"}}


def test_nfc_is_a_rule_that_is_known(tokenizer):
    """Qwen's tokenizers have it: what it changes is changed in the stories before they are counted."""
    config = json.loads(tokenizer.to_json()) | {"normalizer": {"type": "NFC"}}
    composing = Tokenizer.from_json(json.dumps(config), must_keep_text=True)
    text = "cafe\u0301 \u212b"
    assert composing.normalised(text) == composing.decode(composing.encode(text)) == "caf\u00e9 \u00c5"
    theirs = tokenizers.Tokenizer.from_str(json.dumps(config))
    assert composing.encode(text) == theirs.encode(text).ids
    assert composing.encode_batch([text, "plain"]).to_pylist() == [composing.encode(text), composing.encode("plain")]
    assert json.loads(composing.to_json())["normalizer"] == {"type": "NFC"}


def with_a_prefix_space(config):
    return {**config, "pre_tokenizer": {**config["pre_tokenizer"], "add_prefix_space": True}}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (without_some_bytes, "not every text comes back"),
        (with_a_normalizer, r"its normaliser \(NFKD\) changes text"),
        (with_a_prefix_space, "not every text comes back"),
    ],
)
def test_a_tokenizer_that_loses_text_is_refused(tokenizer, tmp_path, change, why):
    path = tmp_path / "lossy.json"
    path.write_text(json.dumps(change(json.loads(tokenizer.to_json()))))
    Tokenizer.load(path)
    with pytest.raises(UserError, match=rf"lossy.json loses text: {why}.*leave out --tokenizer") as caught:
        Tokenizer.load(path, must_keep_text=True)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_that_encodes_a_text_anew_each_time_is_refused(tokenizer):
    config = json.loads(tokenizer.to_json())
    config["model"]["dropout"] = 0.3
    with pytest.raises(UserError, match=r"x\.json has BPE dropout"):
        Tokenizer.from_json(json.dumps(config), "x.json", must_keep_text=True)


def test_a_tokenizer_without_an_entry_for_unknown_letters_ends_in_an_error_of_ours() -> None:
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, END_OF_TEXT: 1}, unk_token="<none>"))
    inner.add_special_tokens([END_OF_TEXT])
    with pytest.raises(TokenizerError):
        Tokenizer.from_json(inner.to_str()).encode("b")


def test_a_store_that_does_not_answer_is_one_line(monkeypatch):
    place = storage_path("memory://tokens/tokenizer.json")
    place.write_bytes(b"{}")

    def away(*_, **__):
        raise RuntimeError("Could not connect\nto the endpoint")

    monkeypatch.setattr(type(place.fs), "cat_file", away)
    with pytest.raises(UserError, match=r"cannot read the tokenizer memory:.*: Could not connect"):
        Tokenizer.load(place)
