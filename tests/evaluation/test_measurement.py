"""Measured on a split: the numbers, the two measures, backends, two tokenizers, and what is refused."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from slm_ray import evaluate, export
from slm_ray.dataset.manifest import load_manifest
from slm_ray.errors import UserError
from slm_ray.evaluation import measurement, output_places, written
from slm_ray.evaluation.losses import bins
from slm_ray.evaluation.measurement import Data, Subject, difference, measure, subject
from slm_ray.evaluation.stories import encoded_anew, read_stories, story_text
from slm_ray.model.threads import torch_threads
from slm_ray.runs import checkpoint
from slm_ray.tokenization.tokenizer import Tokenizer
from slm_ray.tokenization.training import train_bpe
from tests.support.data_sets import write_data
from tests.support.saved_models import save_model, save_talkative
from tests.support.tiny_model import SENTENCES, talkative_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Tokenizer) -> Path:
    return save_talkative(tmp_path_factory.mktemp("models") / "tiny", tiny_tokenizer)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Tokenizer) -> Path:
    return save_talkative(tmp_path_factory.mktemp("models") / "other", tiny_tokenizer, noise=0.01)


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    code = evaluate.main([str(argument) for argument in arguments])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_the_object_says_how_it_was_measured(
    model: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    picture = tmp_path / "loss.png"
    code, out, err = run(capsys, "--model", model, "--data", tiny_data, "--json", "--picture", picture)
    assert (code, err) == (0, "")
    got = json.loads(out)
    manifest = load_manifest(tiny_data)
    wanted = manifest.splits["validation"]
    assert got["model"] == "tiny step-12"
    assert (got["measure"], got["seq_len"], got["stride"], got["split"]) == ("stories", 64, 32, "validation")
    assert (got["stories"], got["tokens"], got["bytes"]) == (wanted.rows, wanted.tokens, wanted.bytes)
    assert got["data_fingerprint"] == manifest.fingerprint
    assert got["perplexity"] == pytest.approx(math.exp(got["loss"]))
    assert got["bits_per_byte"] == pytest.approx(got["loss"] * wanted.tokens / math.log(2) / wanted.bytes)
    assert 0 < got["bits_per_byte_standard_error"] < got["bits_per_byte"]
    for table in ("by_position", "by_length"):
        assert sum(row["tokens"] for row in got[table]) == wanted.tokens
        nats = sum(row["tokens"] * row["loss"] for row in got[table])
        assert nats == pytest.approx(got["loss"] * wanted.tokens)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_person_gets_a_table_and_a_program_one_line(
    model: Path, other: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, "--model", model, "--data", tiny_data, "--against", other)
    assert code == 0
    assert "context 64, stride 32" in err and "95 % interval" in err
    assert len(out.splitlines()) == 1
    got = json.loads(out)
    assert "by_position" not in got
    paired = got["against"]["bits_per_byte_difference"]
    assert paired["mean"] == pytest.approx(got["bits_per_byte"] - got["against"]["bits_per_byte"])
    assert paired["low"] < paired["mean"] < paired["high"]
    assert paired["n_stories"] == 10


def test_the_stream_is_measured_as_training_does(
    model: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["--model", model, "--data", tiny_data, "--json"]
    stream = json.loads(run(capsys, *base, "--measure", "windows")[1])
    fair = json.loads(run(capsys, *base)[1])
    assert (stream["measure"], stream["stride"]) == ("windows", 64)
    assert (stream["tokens"], stream["bytes"]) == (fair["tokens"], fair["bytes"])
    assert "by_position" not in stream
    rounded = json.loads(run(capsys, *base, "--measure", "windows", "--backend", "onnx")[1])
    assert rounded["loss"] == pytest.approx(stream["loss"], rel=1e-6)
    by_story = json.loads(run(capsys, *base, "--backend", "onnx")[1])
    assert by_story["loss"] == pytest.approx(fair["loss"], rel=1e-6)
    assert by_story["loss"] != pytest.approx(stream["loss"], rel=1e-6)


def test_written_stories_are_scored_beside_the_own_endings(
    model: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, "--model", model, "--data", tiny_data, "--writing", "--beginnings", "3")
    assert code == 0
    assert "written stories" in err and "copied 8 grams" in err
    writing = json.loads(out)["writing"]
    assert writing["sampling"] == {"temperature": 0.7, "top_k": 50, "max_tokens": 256}
    assert (writing["scores"]["stories"], writing["own_endings"]["stories"]) == (23, 3)
    assert writing["own_endings"]["unknown_words"] < writing["scores"]["unknown_words"]


def test_another_tokenizer_is_compared_in_bits_per_byte_of_the_same_texts(
    model: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = train_bpe(SENTENCES, vocab_size=300)
    foreign = save_talkative(tmp_path / "foreign", small)
    code, out, _ = run(capsys, "--model", model, "--data", tiny_data, "--against", foreign, "--json")
    assert code == 0
    got = json.loads(out)
    assert got["against"]["bytes"] == got["bytes"] and got["against"]["tokens"] > got["tokens"]
    own = tmp_path / "own-data"
    write_data(own, small, {"validation": [(110, 120)]})
    alone = json.loads(run(capsys, "--model", foreign, "--data", own, "--json")[1])
    assert alone["bits_per_byte"] == got["against"]["bits_per_byte"]
    assert got["against"]["bits_per_byte_difference"]["mean"] == pytest.approx(
        got["bits_per_byte"] - alone["bits_per_byte"]
    )


def test_a_tokenizer_that_loses_text_gives_its_model_no_better_number(
    tiny_data: Path, tiny_tokenizer: Tokenizer
) -> None:
    """Without capitals there is less to foresee, and the bytes are counted of the whole text."""
    values = json.loads(tiny_tokenizer.to_json())
    lower = Tokenizer.from_json(json.dumps(values | {"normalizer": {"type": "Lowercase"}}))
    block = next(read_stories(str(tiny_data), "validation", load_manifest(tiny_data)))
    with pytest.raises(UserError, match="it loses text"):
        encoded_anew(block, tiny_tokenizer, lower)


def test_a_story_comes_back_from_its_tokens(tiny_data: Path, tiny_tokenizer: Tokenizer) -> None:
    (block,) = read_stories(str(tiny_data), "validation", load_manifest(tiny_data))
    small = train_bpe(SENTENCES, vocab_size=300)
    anew = encoded_anew(block, tiny_tokenizer, small)
    for number in range(len(block)):
        assert story_text(anew, number, small) == story_text(block, number, tiny_tokenizer)
        assert anew.story(number)[-1] == small.eos_id


def test_the_difference_of_a_model_to_itself_is_nothing(model: Path, tiny_data: Path) -> None:
    data = Data.open(str(tiny_data), "validation")
    with subject(str(model)) as found, torch_threads(1):
        once, again = measure(found, data), measure(found, data)
    assert once.total == again.total
    paired = difference(once, again)
    assert (paired.mean, paired.standard_error, paired.low, paired.high) == (0, 0, 0, 0)


def test_bins_follow_each_other() -> None:
    assert bins(0) == [(0, 0)]
    assert bins(70)[-4:] == [(16, 31), (32, 47), (48, 63), (64, 70)]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--split", "test"], "has no stories in its test split"),
        (["--against", "no/such/model"], "no model 'no/such/model'"),
        (["--threads", "-1"], "threads (-1) must be 0 or more"),
        (["--measure", "windows", "--against", "x"], "--against needs --measure stories"),
        (["--measure", "windows", "--picture", "x"], "--picture needs --measure stories"),
        (["--measure", "words"], "measure"),
        (["--beginnings", "0"], "beginnings (0) must be at least 1"),
        (["--beginnings", "3"], "--beginnings is of the stories that a model writes: give --writing or --card"),
        (["--picture", "no/such/folder/loss.png"], "cannot write no/such/folder/loss.png"),
        (["--picture", "."], "cannot write .: Is a directory"),
        (["--picture", "/proc/version/loss.png"], "cannot write /proc/version/loss.png: Not a directory"),
        (["--card", "/proc/version/card"], "cannot write /proc/version/card: Not a directory"),
    ],
)
def test_bad_input_is_one_line_and_2_before_anything_is_measured(
    model: Path,
    tiny_data: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    said: str,
) -> None:
    monkeypatch.setattr(measurement, "measure_stories", lambda *_: pytest.fail("measured"))
    monkeypatch.setattr(written, "write_stories", lambda *_: pytest.fail("written"))
    code, out, err = run(capsys, "--model", model, "--data", tiny_data, *arguments)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1 and said in err


def test_an_exported_folder_measures_as_its_checkpoint_and_has_no_card(
    model: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "given-away"
    assert export.main(["--model", str(model), "--output", str(folder)]) == 0
    capsys.readouterr()
    code, out, _ = run(capsys, "--model", folder, "--data", tiny_data, "--against", model)
    got = json.loads(out)
    assert code == 0 and got["model"].startswith("given-away hf-")
    assert got["against"]["bits_per_byte_difference"]["mean"] == 0
    code, _, err = run(capsys, "--model", folder, "--data", tiny_data, "--card", tmp_path / "card")
    assert code == 2 and "a card is of a checkpoint" in err
    (folder / "config.json").write_text('{"model_type": "bert"}')
    code, _, err = run(capsys, "--model", folder, "--data", tiny_data)
    assert code == 2 and len(err.splitlines()) == 1 and "config.json" in err


def test_a_checkpoint_without_its_digests_is_corrupt_still(
    model: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(model, tmp_path / "broken")
    (folder / "complete.json").unlink()
    code, _, err = run(capsys, "--model", folder, "--data", tiny_data)
    assert code == 2 and "complete.json" in err


def test_data_of_another_vocabulary_is_refused(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign = save_talkative(tmp_path / "foreign", train_bpe(SENTENCES, vocab_size=300))
    code, _, err = run(capsys, "--model", foreign, "--data", tiny_data)
    assert code == 2 and "another tokenizer" in err and len(err.splitlines()) == 1


def test_a_token_beyond_the_vocabulary_is_refused(
    tiny_data: Path, tiny_tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tokenizer beside the model is the data's, the model is not its model."""
    folder = save_talkative(tmp_path / "small", train_bpe(SENTENCES, vocab_size=300))
    found, _ = checkpoint.load_model(folder)
    data = Data.open(str(tiny_data), "validation")
    with pytest.raises(Exception, match="vocabulary of the model ends at 299"):
        measure(Subject(name="small", model=found, tokenizer=tiny_tokenizer), data)


@pytest.mark.parametrize("way", ["stories", "windows"])
def test_a_model_that_diverged_is_said_to_have(
    way: str, tiny_data: Path, tiny_tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = talkative_model(tiny_tokenizer)
    torch.nn.init.constant_(broken.norm.weight, float("nan"))
    folder = save_model(tmp_path / "broken", broken, tiny_tokenizer)
    code, out, err = run(capsys, "--model", folder, "--data", tiny_data, "--measure", way)
    assert (code, out) == (2, "") and "diverged" in err


def test_a_shard_that_is_not_the_listed_one_is_refused(
    model: Path, tiny_tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_data(tmp_path, tiny_tokenizer, {"validation": [(0, 4)]})
    path = tmp_path / "validation" / "00000.parquet"
    pq.write_table(pq.read_table(path).slice(0, 3), path)
    code, _, err = run(capsys, "--model", model, "--data", tmp_path)
    assert code == 2 and "truncated or altered" in err


def test_one_story_has_no_standard_error(
    model: Path, tiny_tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_data(tmp_path, tiny_tokenizer, {"validation": [(0, 1)]})
    code, out, err = run(capsys, "--model", model, "--data", tmp_path, "--against", model)
    assert code == 0 and "no interval" in err
    got = json.loads(out)
    assert got["bits_per_byte_standard_error"] is None
    assert got["against"]["bits_per_byte_difference"]["low"] is None
    assert np.isfinite(got["bits_per_byte"])


@pytest.mark.parametrize("option", ["--picture", "--card"])
def test_a_folder_that_cannot_be_written_to_is_refused_before_anything_is_measured(
    model: Path,
    tiny_data: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    option: str,
) -> None:
    monkeypatch.setattr(output_places.os, "access", lambda *_: False)  # of root, every folder can be
    monkeypatch.setattr(measurement, "measure_stories", lambda *_: pytest.fail("measured"))
    monkeypatch.setattr(written, "write_stories", lambda *_: pytest.fail("written"))
    code, out, err = run(capsys, "--model", model, "--data", tiny_data, option, tmp_path / "new")
    assert (code, out) == (2, "") and "cannot write" in err and "Permission denied" in err
    assert not list(tmp_path.iterdir())


def test_stories_of_a_split_that_has_none_are_refused(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Scores against no training story would say that every word is unknown and nothing copied."""
    write_data(tmp_path, tiny_tokenizer, {"validation": [(0, 4)]})
    data = Data.open(str(tmp_path), "validation")
    assert sum(map(len, data.stories())) == 4
    with pytest.raises(UserError, match="has no stories in its train split"):
        list(data.stories("train"))
