"""Where tokenizers come from: each kind keeps every text, has an end-of-text token, and opens elsewhere with the same
ids."""

import itertools
import json
import os
import random
import string
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import prepare
from slm_ray.dataset.shards import read_split
from slm_ray.errors import UserError
from slm_ray.preparation.cleaning import clean_story
from slm_ray.storage import storage_path
from slm_ray.tokenization import loading, training
from slm_ray.tokenization.from_sentencepiece import convert
from slm_ray.tokenization.tokenizer import END_OF_TEXT, PROBES, Tokenizer
from tests.support.paths import ROOT
from tests.support.sentencepiece_models import STORIES, TEXTS, from_model, sentencepiece_model


@cache
def byte_level() -> str:
    """A `tokenizer.json` as others make them: byte-level, without any special token."""
    inner = tokenizers.ByteLevelBPETokenizer()
    inner.train_from_iterator(STORIES, vocab_size=400, show_progress=False)
    return str(inner._tokenizer.to_str())


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "bpe": lambda: training.train(STORIES, 500, "bpe"),
    "unigram": lambda: training.train(STORIES, 500, "unigram"),
    "sentencepiece_unigram": lambda: from_model("unigram"),
    "sentencepiece_bpe": lambda: from_model("bpe"),
    "sentencepiece_without_prefix": lambda: from_model("unigram", add_dummy_prefix=False),
    "end_mark_added": lambda: Tokenizer.from_json(loading.with_end_of_text(byte_level()), must_keep_text=True),
}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return KINDS[request.param]()


@settings(deadline=None, max_examples=50)
@given(text=TEXTS)
def test_every_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    for written in (text, clean_story(text), clean_story(text, keep_paragraphs=True)):
        ids = tokenizer.encode(written)
        assert tokenizer.decode(ids) == written
        assert tokenizer.eos_id not in ids


@settings(deadline=None, max_examples=25)
@given(texts=st.lists(TEXTS, max_size=6))
def test_batch_ids_are_those_of_single_texts(tokenizer: Tokenizer, texts: list[str]) -> None:
    assert tokenizer.encode_batch(texts).to_pylist() == [tokenizer.encode(text) for text in texts]


def test_the_file_opens_in_tokenizers_and_transformers_with_the_same_ids(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    plain = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    for text in [*STORIES[:5], *PROBES, "Two  spaces\nand a line, 日本, \u2581."]:
        ids = tokenizer.encode(text)
        assert plain.encode(text, add_special_tokens=False).ids == ids
        assert theirs.encode(text, add_special_tokens=False) == ids
    assert theirs.convert_tokens_to_ids(END_OF_TEXT) == tokenizer.eos_id
    assert len(theirs) == tokenizer.vocab_size


def test_pieces_join_to_the_text(tokenizer: Tokenizer) -> None:
    text = "Lily didn't see  it.\n"
    assert "".join(tokenizer.pieces(tokenizer.encode(text))).removeprefix(" ") == text


def test_all_bytes_are_in_a_unigram_vocabulary_of_any_size() -> None:
    assert training.train(STORIES, 257, "unigram").vocab_size == 257
    assert training.train(STORIES, 300, "unigram").vocab_size == 300
    assert training.train(["one word"], 5000, "unigram").vocab_size < 300
    assert training.train([], 5000, "unigram").vocab_size == 257
    with pytest.raises(UserError, match="at least 257"):
        training.train(STORIES, 256, "unigram")


@settings(deadline=None, max_examples=25)
@given(texts=st.lists(TEXTS, max_size=5), size=st.integers(257, 320))
def test_unigram_keeps_text_whatever_it_has_learned_from(texts: list[str], size: int) -> None:
    tokenizer = training.train([*texts, "x" * 1500], size, "unigram")
    assert tokenizer.vocab_size <= size
    assert [tokenizer.decode(tokenizer.encode(text)) for text in (*texts, *PROBES)] == [*texts, *PROBES]


def test_a_unigram_vocabulary_holds_frequent_words_whole() -> None:
    tokenizer = training.train(STORIES, 900, "unigram")
    assert tokenizer.eos_id == 0
    frequent = [word for word, count in Counter(" ".join(STORIES).split(" ")).items() if count > 50 and word.isalpha()]
    assert len(frequent) > 10
    whole = [word for word in frequent if len(tokenizer.encode(f" {word}")) == 1]
    assert len(whole) > 0.8 * len(frequent)


def test_ids_beyond_16_bits_are_taken_wide() -> None:
    words = ["".join(word) for word in itertools.product(string.ascii_letters[:42], repeat=3)]
    tokenizer = training.train([" ".join(words)], 66_000, "bpe")
    assert tokenizer.vocab_size == 66_000
    ids = tokenizer.encode_batch([" ".join(words)])
    assert str(ids.type) == "list<item: uint32>"
    assert ids.to_pylist()[0] == tokenizer.encode(" ".join(words))
    assert max(ids.to_pylist()[0]) > 2**16


TRAIN = """
from slm_ray.tokenization import training
from slm_ray.corpus.grammar import sample_stories
stories = [str(story) for story in sample_stories(0, 60)]
for model in training.TOKENIZER_MODELS:
    print(training.train(stories[::-1], 600, model).sha256)
"""


def test_training_gives_the_same_file_in_every_process_and_order() -> None:
    surroundings = {**os.environ, "PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "1"}
    elsewhere = subprocess.check_output([sys.executable, "-c", TRAIN], cwd=ROOT, env=surroundings, encoding="utf-8")
    here = [training.train(STORIES, 600, model).sha256 for model in training.TOKENIZER_MODELS]
    assert elsewhere.split() == here


# files, folders and the end-of-text token


def test_a_file_a_folder_and_a_model_are_opened(tmp_path: Path) -> None:
    trained = KINDS["bpe"]()
    trained.save(tmp_path / "tokenizer.json")
    (tmp_path / "stories.model").write_bytes(sentencepiece_model("unigram"))
    assert loading.open_tokenizer(str(tmp_path)).sha256 == trained.sha256
    assert loading.open_tokenizer(str(tmp_path / "tokenizer.json")).sha256 == trained.sha256
    assert loading.open_tokenizer(f"file://{tmp_path}/tokenizer.json").sha256 == trained.sha256
    (storage_path("memory://tokenizers") / "tokenizer.json").write_text(trained.to_json())
    assert loading.open_tokenizer("memory://tokenizers").sha256 == trained.sha256
    converted = loading.open_tokenizer(str(tmp_path / "stories.model"))
    converted.save(tmp_path / "tokenizer.json")
    assert loading.open_tokenizer(str(tmp_path)).sha256 == converted.sha256


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(b"\xff{}")
    (tmp_path / "x.model").write_bytes(b"no model")
    for name, why in [("x.json", "is not a tokenizer.json"), ("x.model", "is not a SentencePiece .model")]:
        with pytest.raises(UserError, match=f"{name} {why}"):
            loading.open_tokenizer(str(tmp_path / name))
    for missing in (tmp_path, tmp_path / "absent.json", tmp_path / "absent.model"):
        with pytest.raises(UserError, match=r"cannot read the tokenizer .*give a tokenizer.json, a folder"):
            loading.open_tokenizer(str(missing))


def test_the_end_mark_takes_the_next_free_id_and_moves_no_other() -> None:
    before = tokenizers.Tokenizer.from_str(byte_level())
    before.add_special_tokens(["</s>", "<pad>"])
    after = Tokenizer.from_json(loading.with_end_of_text(before.to_str()))
    assert (after.eos_id, after.vocab_size) == (402, 403)
    assert {**before.get_vocab(), END_OF_TEXT: 402} == tokenizers.Tokenizer.from_str(after.to_json()).get_vocab()


def test_an_end_mark_that_is_plain_text_becomes_special() -> None:
    config = json.loads(loading.with_end_of_text(byte_level()))
    config["added_tokens"][0]["special"] = False
    tokenizer = Tokenizer.from_json(loading.with_end_of_text(json.dumps(config)), must_keep_text=True)
    assert tokenizer.eos_id == 400
    assert 400 not in tokenizer.encode(f"a{END_OF_TEXT}")


def test_an_entry_named_like_the_end_mark_becomes_it() -> None:
    config = json.loads(byte_level())
    config["model"]["vocab"][END_OF_TEXT] = 400
    tokenizer = Tokenizer.from_json(loading.with_end_of_text(json.dumps(config)), must_keep_text=True)
    assert (tokenizer.eos_id, tokenizer.vocab_size) == (400, 401)


def test_an_end_mark_that_a_text_can_contain_is_refused(tmp_path: Path) -> None:
    config = json.loads(convert(sentencepiece_model("unigram"), "x.model"))
    config["model"]["vocab"].append([END_OF_TEXT, 0.0])
    (tmp_path / "x.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UserError, match="in a story become the end-of-text token"):
        loading.open_tokenizer(str(tmp_path / "x.json"))


def test_ids_with_holes_are_refused() -> None:
    config = json.loads(byte_level())
    config["model"]["vocab"]["zzzz"] = config["model"]["vocab"].pop("a") + 400
    config["model"]["vocab"]["a"] = 401
    with pytest.raises(UserError, match="its ids have holes"):
        loading.with_end_of_text(json.dumps(config))


# the hub


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's HTTP interface as a download of one file needs."""

    revision = "607a30d783dfa663caf39e06633721c8d4cfccd7"
    files: dict[str, bytes]

    def do_HEAD(self) -> None:
        content = self.files.get(self.path)
        self.send_response(200 if content is not None else 404)
        self.send_header("X-Repo-Commit", self.revision)
        self.send_header("ETag", '"0123456789"')
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        self.wfile.write(self.files.get(self.path, b""))

    def log_message(self, *_: object) -> None: ...


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    file = byte_level().encode("utf-8")
    names = ("openai-community/gpt2/resolve/main", "some/one/resolve/v2")
    Hub.files = {f"/{name}/tokenizer.json": file for name in names}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


OPEN = """
import sys
from pipelines import prepare
from slm_ray.tokenization import loading
for name in sys.argv[1:]:
    try:
        print(loading.open_tokenizer(name).sha256)
    except loading.UserError as error:
        print("error:", error)
"""


def open_by_name(endpoint: str, home: Path, *names: str) -> list[str]:
    surroundings = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
    surroundings.pop("HF_HUB_OFFLINE", None)
    command = [sys.executable, "-c", OPEN, *names]
    done = subprocess.run(
        command, cwd=ROOT, env=surroundings, check=True, capture_output=True, encoding="utf-8", timeout=60
    )
    assert "Retrying" not in done.stderr
    return done.stdout.splitlines()


def test_the_hub_is_asked_by_name_and_without_it_its_copy_is_used(hub: str, tmp_path: Path) -> None:
    wanted = Tokenizer.from_json(loading.with_end_of_text(byte_level())).sha256
    *opened, refused = open_by_name(hub, tmp_path, "gpt2", "hub:some/one@v2", "hub:some/one@v3")
    assert opened == [wanted, wanted]
    assert refused.startswith("error: cannot get the tokenizer hub:some/one@v3 (")
    nobody = "http://127.0.0.1:1"
    kept, refused = open_by_name(nobody, tmp_path, "gpt2", "hub:some/other")
    assert kept == wanted
    assert refused.startswith("error: cannot get the tokenizer hub:some/other (")
    assert refused.endswith("give a file, try again with a network, or leave out --tokenizer to train one")


@pytest.mark.parametrize("word", ["hub:", "hub:some/one:train", "hub:some one", "hub:some/one@"])
def test_a_word_that_names_no_tokenizer_of_the_hub_is_refused(word: str) -> None:
    with pytest.raises(UserError, match=rf"{word} is not a tokenizer of the hub: expected hub:OWNER/NAME\[@REVISION\]"):
        loading.open_tokenizer(word)


# the whole pipeline


def prepare_sample(output: Path, *words: str) -> Tokenizer:
    common = ["--runner", "DirectRunner", "--source", "sample", "--max-stories", "60", "--output", str(output)]
    assert prepare.main([*common, *words]) == 0
    for split in ("train", "validation", "test"):
        tokens, n_bytes = read_split(output, split)
        tokenizer = Tokenizer.load(output / "tokenizer.json")
        assert n_bytes == len(tokenizer.decode(tokens.tolist()).encode())
    return tokenizer


def test_a_data_set_with_unigram_says_when_the_stories_are_too_few(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = prepare_sample(tmp_path, "--tokenizer-model", "unigram", "--vocab-size", "70000")
    notice = f"{tokenizer.vocab_size:,} entries (not 70,000: the stories have too few different words)"
    printed = capsys.readouterr()
    assert printed.out.count(notice) == 1
    warning = f"warning: the tokenizer has {tokenizer.vocab_size:,} entries and not 70,000, as the training stories"
    assert printed.err.count(warning) == 1


def test_a_data_set_with_a_sentencepiece_model(tmp_path: Path) -> None:
    (tmp_path / "stories.model").write_bytes(sentencepiece_model("unigram", add_dummy_prefix=False))
    tokenizer = prepare_sample(tmp_path / "data", "--tokenizer", str(tmp_path / "stories.model"))
    assert tokenizer.sha256 == from_model("unigram", add_dummy_prefix=False).sha256


def test_bpe_learns_nothing_from_endless_words():
    texts = ["The cat sat on the mat. " * 60, "The dog."]
    endless = ["The cat sat on the mat. " * 60 + "x" * 5000, "The dog."]
    assert training.train(endless, 300).to_json() == training.train(texts, 300).to_json()


def chinese(n_chars: int, n_stories: int = 60, marks: str = "，。") -> list[str]:
    rng = random.Random(3)
    words = ["小明", "老猫", "白兔", "找到了", "丢掉了", "看见了", "一只红色的小船", "一顶温暖的帽子", "大家都非常高兴"]
    stories = []
    for _ in range(n_stories):
        text = ""
        while len(text) < n_chars:
            text += "".join(rng.choices(words, k=4)) + rng.choice(marks or [""])
        stories.append(text)
    return stories


@pytest.mark.parametrize("model", training.TOKENIZER_MODELS)
@pytest.mark.parametrize("marks", ["，。", ""])
def test_stories_of_any_length_without_a_space_are_learned_from(model: str, marks: str) -> None:
    """A run between spaces of more than 1,000 characters was left out, and with it the whole story."""
    short, long = (training.train(chinese(n, marks=marks), 400, model) for n in (900, 1100))
    assert short.vocab_size == long.vocab_size > 300
    story = chinese(1100, 1, marks)[0]
    assert len(long.encode(story)) < 1.1 * len(short.encode(story)) < len(story)  # in bytes it has 3 times as many


@given(TEXTS, st.text(st.sampled_from("日本語。x' \n"), max_size=60))
def test_a_text_is_cut_inside_endless_words_only(text: str, endless: str) -> None:
    whole = text + endless * 40
    parts = list(training.cut_endless_words(whole))
    pre_tokens = training.count_words([whole])
    assert all(len(word) <= 1000 or set(word) <= {"Ġ"} for word in pre_tokens)
    if "x" * 40 not in whole and "'" * 40 not in whole:
        assert "".join(parts) == whole
