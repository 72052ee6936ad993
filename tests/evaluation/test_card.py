"""A card says what can be computed again, and an altered one is found out."""

import copy
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from slm_ray import evaluate
from slm_ray.corpus.consistency import THREAD_CHECK
from slm_ray.evaluation.card import machine, page, verification
from slm_ray.evaluation.card.content import DIGEST, digest
from slm_ray.tokenization.tokenizer import Tokenizer
from slm_ray.tokenization.training import train_bpe
from tests.support.data_sets import write_data
from tests.support.paths import ROOT
from tests.support.saved_models import save_talkative
from tests.support.tiny_model import SENTENCES

Card = dict[str, Any]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Tokenizer) -> Path:
    return save_talkative(tmp_path_factory.mktemp("models") / "tiny", tiny_tokenizer, seq_len=48)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, model: Path, tiny_data: Path) -> Path:
    folder = tmp_path_factory.mktemp("card") / "card"
    options = ["--card", folder, "--model", model, "--data", tiny_data, "--beginnings", "3", "--threads", "1"]
    assert evaluate.main([str(option) for option in options]) == 0
    return folder


@pytest.fixture
def card(written: Path) -> Card:
    content: Card = json.loads((written / "card.json").read_text())
    return content


def check(
    capsys: pytest.CaptureFixture[str], path: Path, model: Path, data: Path, *more: str
) -> tuple[int, list[str], str]:
    code = evaluate.main(["--verify", str(path), "--model", str(model), "--data", str(data), *more])
    shown = capsys.readouterr()
    return code, shown.out.splitlines(), shown.err


@pytest.fixture
def check_altered(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    model: Path,
    tiny_data: Path,
    card: Card,
) -> Callable[[Card], tuple[int, list[str]]]:
    """The true numbers are known here: they are not computed again for each alteration."""
    truth = copy.deepcopy(card)
    monkeypatch.setattr(verification, "make_card", lambda *_: copy.deepcopy(truth))

    def checked(altered: Card) -> tuple[int, list[str]]:
        path = tmp_path / "altered.json"
        path.write_text(json.dumps(altered))
        code, out, err = check(capsys, path, model, tiny_data)
        assert err == ""
        return code, out

    return checked


def test_a_card_is_computed_again_to_the_last_digit_by_another_process(
    written: Path, model: Path, tiny_data: Path
) -> None:
    command = [sys.executable, ROOT / "slm_ray" / "evaluate.py", "--verify", written, "--model", model]
    done = subprocess.run([*command, "--data", tiny_data], capture_output=True, text=True, check=False, timeout=300)
    assert done.stderr == "" and done.returncode == 0
    assert done.stdout.startswith("equal: ") and "to the last digit" in done.stdout


def test_a_card_holds_its_measure_and_no_place(written: Path, card: Card, model: Path, tiny_data: Path) -> None:
    assert {path.name for path in written.iterdir()} == {"card.json", "card.md", "card.html", "loss.png"}
    loss = card["loss"]
    assert (loss["measure"], loss["seq_len"], loss["stride"], loss["backend"]) == ("stories", 48, 24, "torch")
    assert loss["bits_per_byte"] == pytest.approx(
        loss["loss"] * card["data"]["tokens"] / math.log(2) / card["data"]["bytes"]
    )
    assert len(card["writing"]["stories"]) == card["writing"]["scores"]["stories"] == 23
    assert card["made_with"]["machine"]["threads"] == 1
    assert card[DIGEST] == digest(card)
    assert all(row["source"] and row["differs"] for row in card["published"])
    for name in ("card.json", "card.md", "card.html"):
        text = (written / name).read_text()
        assert str(model.parent) not in text and str(tiny_data.parent) not in text
    assert f"{loss['bits_per_byte']:.4f}" in (written / "card.md").read_text()
    assert "stories15M" in (written / "card.html").read_text()


def test_a_card_of_a_mixture_is_true_wherever_its_data_sets_lie(
    model: Path, tiny_data: Path, tiny_tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here, moved, made = tmp_path / "zz-here", tmp_path / "zz-moved", tmp_path / "card"
    write_data(here, tiny_tokenizer, {"train": [(500, 510)], "validation": [(530, 534)]})
    words = ["--model", str(model), "--data", f"{tiny_data}=0.7"]
    assert evaluate.main([*words, f"{here}=0.3", "--card", str(made), "--beginnings", "3", "--threads", "1"]) == 0
    here.rename(moved)
    capsys.readouterr()
    assert evaluate.main([*words, f"{moved}=0.3", "--verify", str(made)]) == 0
    assert "to the last digit" in capsys.readouterr().out
    content = json.loads((made / "card.json").read_text())
    assert [row["stories"] for row in content["loss"]["by_data_set"]] == [10, 4]
    assert content["data"]["stories"] == 14 and content["data"]["training_stories"] == 120
    assert "zz-" not in (made / "card.json").read_text()
    assert "## Loss by data set" in (made / "card.md").read_text()


def _set(card: Card, name: str, value: object) -> None:
    *path, last = name.split(".")
    at: Any = card
    for part in path:
        at = at[int(part)] if part.isdigit() else at[part]
    at[int(last) if last.isdigit() else last] = value


@pytest.mark.parametrize("is_signed_anew", [True, False])
@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("loss.bits_per_byte", 0.5, "loss.bits_per_byte is 0.5"),
        ("loss.by_length.0.stories", 1000, "loss.by_length[0].stories is 1000"),
        ("writing.scores.distinct_2", 1.0, "writing.scores.distinct_2 is 1.0"),
        ("writing.stories.2.text", " A better story.", 'writing.stories[2].text is " A better story."'),
        ("model.step", 10**6, "model.step is 1000000"),
        ("published.0.loss", 9.9, "published[0].loss is 9.9"),
        ("note", "the best model", 'note is "the best model" in the card, and null was computed'),
    ],
)
def test_an_altered_value_is_named(
    check_altered: Callable[[Card], tuple[int, list[str]]],
    card: Card,
    name: str,
    value: object,
    said: str,
    is_signed_anew: bool,
) -> None:
    _set(card, name, value)
    if is_signed_anew:
        card[DIGEST] = digest(card)
    code, out = check_altered(card)
    assert code == 1 and len(out) == 1
    assert out[0].startswith(f"not equal: {said}")


def test_the_last_digit_counts(check_altered: Callable[[Card], tuple[int, list[str]]], card: Card) -> None:
    card["loss"]["loss"] = math.nextafter(card["loss"]["loss"], 1)
    assert check_altered(card)[0] == 1


def test_a_card_says_the_licence_of_its_stories_and_one_of_before_need_not(
    check_altered: Callable[[Card], tuple[int, list[str]]], card: Card, written: Path
) -> None:
    assert card["data"]["licence"] == "not known: ask whoever made the stories", "which no file says of these"
    assert "licence of its stories" in (written / "card.md").read_text()
    del card["data"]["licence"]
    card[DIGEST] = digest(card)
    assert check_altered(card)[0] == 0
    assert "licence of its stories" not in page.markdown(card)
    card["data"]["licence"] = "CC0-1.0"
    card[DIGEST] = digest(card)
    code, lines = check_altered(card)
    assert code == 1 and "data.licence" in lines[0]


def test_a_thread_that_another_version_s_check_counted_is_not_compared_and_that_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    model: Path, tiny_data: Path, tmp_path: Path, card: Card,
) -> None:  # fmt: skip
    """The check of the sample corpus became stricter: a true card of before was called untrue."""
    card["made_with"]["thread_check"], card["writing"]["scores"]["corpus_thread"] = THREAD_CHECK, 0.5
    truth = copy.deepcopy(card)
    monkeypatch.setattr(verification, "make_card", lambda *_: copy.deepcopy(truth))

    def checked(altered: Card) -> tuple[int, list[str], str]:
        path = tmp_path / "altered.json"
        path.write_text(json.dumps(altered | {DIGEST: digest(altered)}))
        return check(capsys, path, model, tiny_data)

    card["writing"]["scores"]["corpus_thread"] = 0.9
    code, lines, _ = checked(card)
    assert code == 1 and lines == ["not equal: writing.scores.corpus_thread is 0.9 in the card, and 0.5 was computed"]
    del card["made_with"]["thread_check"]
    code, lines, _ = checked(card)
    assert code == 0 and "corpus_thread is not compared: another version" in lines[0]
    del truth["made_with"]["thread_check"]  # of other stories than those of the corpus
    truth["writing"]["scores"]["corpus_thread"] = card["writing"]["scores"]["corpus_thread"] = None
    assert checked(card)[0] == 0
    card["made_with"]["thread_check"] = 1
    assert checked(card)[0] == 1


def test_an_altered_name_or_digest_is_an_altered_card(
    check_altered: Callable[[Card], tuple[int, list[str]]], card: Card
) -> None:
    card["model"]["name"] = "gpt-5"
    code, out = check_altered(card)
    assert code == 1 and out[0].startswith("not equal: sha256 is ")


def test_elsewhere_losses_may_differ_a_little_and_scores_may_not(
    check_altered: Callable[[Card], tuple[int, list[str]]], card: Card
) -> None:
    card["made_with"]["machine"]["instructions"] = "OTHER"
    card["loss"]["loss"] *= 1 + 1e-7
    card[DIGEST] = digest(card)
    code, out = check_altered(card)
    assert code == 0 and "another kind of machine" in out[0]
    near = copy.deepcopy(card)
    near["loss"]["bits_per_byte"] *= 1.001
    near[DIGEST] = digest(near)
    code, out = check_altered(near)
    assert code == 1 and out[0].startswith("not equal: loss.bits_per_byte")
    card["writing"]["scores"]["ended"] = 0.987
    card[DIGEST] = digest(card)
    code, out = check_altered(card)
    assert code == 1 and out == [line for line in out if line.startswith("not equal: writing.scores.ended is 0.987")]


@pytest.mark.parametrize("numerics", [None, 99, "other"])
def test_a_card_of_a_version_with_other_last_digits_is_true_and_says_so(
    check_altered: Callable[[Card], tuple[int, list[str]]], card: Card, numerics: object
) -> None:
    """Earlier versions named none: their rotary angles were computed in double precision."""
    assert card["made_with"]["machine"].pop("numerics", 0) == machine.NUMERICS
    card["made_with"]["machine"] |= {} if numerics is None else {"numerics": numerics}
    card["loss"]["loss"] *= 1 + 1e-9
    card[DIGEST] = digest(card)
    code, out = check_altered(card)
    assert code == 0 and len(out) == 1
    assert "made by a version of SLM-Ray whose numbers are other ones in the last digits: " in out[0]
    card["loss"]["bits_per_byte"] *= 1.001
    card[DIGEST] = digest(card)
    code, out = check_altered(card)
    assert code == 1 and out[0].startswith("not equal: loss.bits_per_byte")
    assert len(out) == 2 and out[1].startswith("made by a version of SLM-Ray")


def test_elsewhere_most_stories_are_written_again(
    check_altered: Callable[[Card], tuple[int, list[str]]], card: Card
) -> None:
    card["made_with"]["machine"]["instructions"] = "OTHER"
    for story in card["writing"]["stories"]:
        story["text"] += " The end."
    card[DIGEST] = digest(card)
    code, out = check_altered(card)
    assert code == 1 and any("0 of them the same" in line for line in out)


@pytest.mark.parametrize(
    "story",
    [
        {"prompt": "Once"},
        {"prompt": "Once", "text": 3, "tokens": [1], "is_ended": True},
        {"prompt": "Once", "text": "a", "tokens": [2**70], "is_ended": True},
        {"prompt": "Once", "text": "a", "tokens": ["b"], "is_ended": True},
        {"prompt": "Once", "text": "a", "tokens": [-1], "is_ended": True},
        {"prompt": "Once", "text": "a", "tokens": list(range(-9, 3)), "is_ended": True},
        "a story",
    ],
)
def test_elsewhere_what_stands_for_a_story_is_refused_or_named(
    card: Card,
    story: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    model: Path,
    tiny_data: Path,
) -> None:
    truth = copy.deepcopy(card)
    monkeypatch.setattr(verification, "make_card", lambda *_: copy.deepcopy(truth))
    card["made_with"]["machine"]["instructions"] = "OTHER"
    card["writing"]["stories"][1] = story
    (tmp_path / "card.json").write_text(json.dumps(card))
    code, out, err = check(capsys, tmp_path, model, tiny_data)
    assert (code == 2 and len(err.splitlines()) == 1) or (code == 1 and out[0].startswith("not equal: "))


def test_a_name_that_spells_a_place_hides_no_false_value(
    check_altered: Callable[[Card], tuple[int, list[str]]], card: Card
) -> None:
    card["loss.bits_per_byte"] = card["loss"]["bits_per_byte"]
    card["loss"]["bits_per_byte"] = 0.1
    card[DIGEST] = digest(card)
    code, out = check_altered(card)
    assert code == 1 and any(line.startswith("not equal: loss.bits_per_byte is 0.1") for line in out)


def test_an_added_null_is_an_altered_card(check_altered: Callable[[Card], tuple[int, list[str]]], card: Card) -> None:
    card["note\x1b[2J"] = None
    card[DIGEST] = digest(card)
    code, out = check_altered(card)
    assert code == 1 and out[0].startswith(r"not equal: note\x1b[2J is null")


@pytest.mark.parametrize(
    ("field", "value"),
    [("prompt", "Once upon a time, the best of models"), ("seed", 5), ("story_id", "sample#1"), ("tokens", [])],
)
def test_elsewhere_a_story_has_its_beginning_its_seed_and_the_text_of_its_tokens(
    card: Card,
    field: str,
    value: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    model: Path,
    tiny_data: Path,
) -> None:
    truth = copy.deepcopy(card)
    monkeypatch.setattr(verification, "make_card", lambda *_: copy.deepcopy(truth))
    card["made_with"]["machine"]["instructions"] = "OTHER"
    assert card["writing"]["stories"][2][field] != value
    card["writing"]["stories"][2][field] = value
    (tmp_path / "card.json").write_text(json.dumps(card))
    code, out, err = check(capsys, tmp_path, model, tiny_data)
    named = "text" if field == "tokens" else field
    assert (code, err) == (1, "") and out[0].startswith(f"not equal: writing.stories[2].{named} is ")


@pytest.mark.parametrize("name", [5, None, {}, "\ud800"])
def test_a_card_names_its_model_in_text(
    card: Card, tmp_path: Path, model: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str], name: Any
) -> None:
    card["model"]["name"] = name
    (tmp_path / "card.json").write_text(json.dumps(card))
    code, out, err = check(capsys, tmp_path, model, tiny_data)
    assert (code, out) == (2, []) and "is no card" in err and len(err.splitlines()) == 1


def test_a_card_that_says_a_thing_twice_is_none(
    card: Card, tmp_path: Path, model: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "card.json").write_text('{"loss": {"bits_per_byte": 0.1}, ' + json.dumps(card)[1:])
    code, out, err = check(capsys, tmp_path, model, tiny_data)
    assert (code, out) == (2, []) and "is no card" in err


@pytest.mark.parametrize("name", ["card.md", "card.html"])
def test_an_altered_page_is_named(
    check_altered: Callable[[Card], tuple[int, list[str]]],
    written: Path,
    tmp_path: Path,
    card: Card,
    name: str,
) -> None:
    text = (written / name).read_text()
    (tmp_path / name).write_text(text)
    assert check_altered(card)[0] == 0
    (tmp_path / name).write_text(text.replace("bits per byte", "bits per bit"))
    code, out = check_altered(card)
    assert code == 1 and out[0].startswith(f"not equal: {name}")


def test_the_picture_s_bytes_are_no_number(
    check_altered: Callable[[Card], tuple[int, list[str]]], written: Path, tmp_path: Path, card: Card
) -> None:
    (tmp_path / "card.html").write_text((written / "card.html").read_text().replace("base64,iVBOR", "base64,AAAA"))
    assert check_altered(card)[0] == 0


def test_json_for_a_program(
    check_altered: Callable[[Card], tuple[int, list[str]]],
    written: Path,
    model: Path,
    tiny_data: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, out, _ = check(capsys, written / "card.json", model, tiny_data, "--json")
    got = json.loads(out[0])
    assert (code, got["equal"], got["is_same_kind"], got["differences"]) == (0, True, True, [])
    assert got["is_same_version"]


def test_other_data_and_another_model_are_refused(
    written: Path,
    model: Path,
    tiny_data: Path,
    tiny_tokenizer: Tokenizer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_data(tmp_path, tiny_tokenizer, {"train": [(0, 9)], "validation": [(9, 12)]})
    code, out, err = check(capsys, written, model, tmp_path)
    assert (code, out) == (2, []) and "another data set" in err and len(err.splitlines()) == 1
    other = save_talkative(tmp_path / "other", tiny_tokenizer, seq_len=48, noise=0.01)
    code, _, err = check(capsys, written, other, tiny_data)
    assert code == 2 and "another model: its weights_sha256" in err
    foreign = save_talkative(tmp_path / "foreign", train_bpe(SENTENCES, vocab_size=300))
    code, _, err = check(capsys, written, foreign, tiny_data)
    assert code == 2 and "another model" in err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot read the card"),
        ("{", "it is no JSON"),
        ("[]", "is no card"),
        ("[" * 100_000, "it is no JSON"),
        ('{"a":' * 900 + "1" + "}" * 900, "is no card"),
        ({"format_version": 99}, "format version 99, expected 1"),
        ({"data": {"split": "all"}}, "data.split is all: expected one of train"),
        ({"data": 3}, "data.split is null"),
        ({"made_with": {}}, "does not say how it was made"),
        ({"made_with": {"machine": {"threads": 10**9}, "beginnings": 3}}, "threads and beginnings must be numbers"),
    ],
)
def test_what_is_no_card_is_one_line_and_2(
    card: Card,
    tmp_path: Path,
    model: Path,
    tiny_data: Path,
    capsys: pytest.CaptureFixture[str],
    content: Any,
    said: str,
) -> None:
    path = tmp_path / "card.json"
    if content is not None:
        path.write_text(content if isinstance(content, str) else json.dumps(card | content))
    code, out, err = check(capsys, path, model, tiny_data)
    assert (code, out) == (2, []) and said in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(("stated", "cores", "used"), [(1024, 2, 16), (1024, 8, 32), (32, 8, 32), (5, 1, 5)])
def test_a_card_gets_no_more_threads_than_this_machine_can_bear(
    card: Card,
    tmp_path: Path,
    model: Path,
    tiny_data: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    stated: int,
    cores: int,
    used: int,
) -> None:
    seen: list[tuple[int, int]] = []
    truth = copy.deepcopy(card)
    truth["made_with"]["machine"]["threads"] = used

    def computed(*given: Any) -> Card:
        seen.append((given[-1], torch.get_num_threads()))
        return copy.deepcopy(truth)

    monkeypatch.setattr(verification, "make_card", computed)
    monkeypatch.setattr(verification, "scored_again", lambda *_: copy.deepcopy(truth["writing"]))
    monkeypatch.setattr(machine, "core_count", lambda: cores)
    card["made_with"]["machine"]["threads"] = stated
    card[DIGEST] = digest(card)
    (tmp_path / "card.json").write_text(json.dumps(card))
    code, out, _ = check(capsys, tmp_path / "card.json", model, tiny_data)
    assert (code, seen) == (0, [(used, used)])
    assert ("another kind of machine" in out[0]) == (stated != used)  # where a loss may differ in its last digits


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--verify", "x", "--card", "y"], "give one of them"),
        (["--verify", "x", "--split", "test"], "--split does nothing beside --verify"),
        (["--verify", "x", "--beginnings", "3"], "--beginnings does nothing beside --verify"),
        (["--card", "x", "--measure", "windows"], "--measure does nothing beside --card"),
        (["--card", "x", "--against", "y"], "--against does nothing beside --card"),
        (["--card", "x", "--split", "test"], "no stories in its test split"),
    ],
)
def test_options_that_would_be_ignored_are_refused(
    model: Path,
    tiny_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert evaluate.main(["--model", str(model), "--data", str(tiny_data), *options]) == 2
    err = capsys.readouterr().err
    assert said in err and len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_folder_with_something_else_in_it_is_left_alone(
    model: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "diary.txt").write_text("mine")
    assert evaluate.main(["--model", str(model), "--data", str(tiny_data), "--card", str(tmp_path)]) == 2
    assert "holds diary.txt" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["diary.txt"]
    assert evaluate.main(["--model", str(model), "--data", str(tiny_data), "--card", str(tmp_path / "diary.txt")]) == 2
    assert "cannot write a card" in capsys.readouterr().err


def test_data_without_training_stories_has_no_card(
    model: Path, tiny_tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_data(tmp_path, tiny_tokenizer, {"validation": [(0, 3)]})
    code = evaluate.main(["--model", str(model), "--data", str(tmp_path), "--card", str(tmp_path / "card")])
    assert code == 2 and "has no training stories" in capsys.readouterr().err
    assert not (tmp_path / "card").exists()


def test_no_text_acts_as_markup(card: Card) -> None:
    evil = "<script>alert(1)</script> | **bold** \x1b[31m\n# title"
    card["model"]["name"] = evil
    card["writing"]["stories"][0]["text"] = evil
    for text in (page.html(card), page.markdown(card)):
        assert "<script>" not in text and "\x1b" not in text
    assert "**bold**" not in page.markdown(card)
    assert "\n# title" not in page.markdown(card)
