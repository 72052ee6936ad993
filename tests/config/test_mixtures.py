"""`--data A=0.7 B=0.3`: what is one option, what is a mixture, what is refused."""

import json
from pathlib import Path

import pytest

from slm_ray.config.mixtures import DataShare, each_place, joined_data, mixtures_text, named_data, part_names, parts_of
from slm_ray.config.places import moved_data, portable_config, saved_config, typed_config
from slm_ray.errors import UserError


@pytest.mark.parametrize("words", [
    "--data A=0.7 B=0.3 --seed 1", "--data A=0.7 --seed 1 --data B=0.3", "--data=A=0.7 --data=B=0.3 --seed 1",
    "--data=A=0.7 B=0.3 --seed 1",
])  # fmt: skip
def test_several_words_are_one_option(words: str) -> None:
    joined = joined_data(words.split())
    place = joined.index("--data")
    assert joined[place + 1] == "A=0.7 B=0.3" and {*joined} == {"--data", "A=0.7 B=0.3", "--seed", "1"}
    assert parts_of(joined[place + 1]) == [("A", 0.7), ("B", 0.3)]


@pytest.mark.parametrize("words", ["--data A --seed 1", "--data A --data B", "--data A junk", "--seed 1", "--data"])
def test_what_is_no_mixture_is_left_alone(words: str) -> None:
    assert joined_data(words.split()) == words.split()


def test_a_path_with_a_space_is_quoted() -> None:
    joined = joined_data(["--data", "my stories=2", "B=1"])
    assert parts_of(joined[1]) == [("my stories", 2.0), ("B", 1.0)]


@pytest.mark.parametrize("data", ["A", "data/tiny stories", "lang=en", "it's", ""])
def test_one_data_set_is_no_mixture(data: str) -> None:
    assert parts_of(data) == []


def test_a_folder_of_that_very_name_is_that_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=1 b=2").mkdir()
    assert parts_of("a=1 b=2") == []


@pytest.mark.parametrize(("data", "message"), [
    ("A=0.7 B=-0.3", r"B=-0.3 must be FOLDER=WEIGHT with a weight above 0"), ("A=0.7 B=0", "B=0 must be"),
    ("A=0.7 B=x", "B=x must be"), ("A=0.7 B", "B must be"), ("A=nan B=1", "A=nan must be"), ("A=inf B=1", "A=inf"),
    ("A=1 =2", "=2 must be"), ("A=1 ./A=2", "./A is named twice"), ("A= B=1", "A= must be"),
])  # fmt: skip
def test_what_cannot_be_weighed_is_refused(data: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parts_of(data)


def test_each_place_of_a_mixture_is_changed_for_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    here = f"{tmp_path}/a=0.7 {tmp_path}/b=0.3"
    assert each_place("a=0.7 b=0.3", lambda place: f"{tmp_path}/{place}") == here
    assert typed_config({"data": here})["data"] == "a=0.7 b=0.3"
    assert portable_config({"data": here})["data"] == "a=0.7 b=0.3"
    for name in ("a", "b"):
        (tmp_path / "moved" / name).mkdir(parents=True)
    moved = moved_data("/gone/a=0.7 /gone/b=0.3", "/gone/runs", tmp_path / "moved" / "runs")
    assert moved == f"{tmp_path}/moved/a=0.7 {tmp_path}/moved/b=0.3"


@pytest.mark.parametrize("word", ["-h", "-c"])
def test_a_short_option_behind_the_parts_is_none(word: str) -> None:
    assert joined_data(["--data", "A=0.7", "B=0.3", word]) == ["--data", "A=0.7 B=0.3", word]


def test_what_stands_behind_one_data_set_is_left_alone() -> None:
    assert joined_data(["--data=A", "junk"]) == ["--data=A", "junk"]


def test_parts_of_one_last_name_are_told_apart() -> None:
    assert part_names(["x/s", "y/s", "t", "u/s-1"]) == ["s-2", "s-3", "t", "s-1"]
    data = portable_config({"data": "/home/me/x/s=0.7 /home/me/y/s=0.3"})["data"]
    assert parts_of(data) == [("s-1", 0.7), ("s-2", 0.3)]


def test_a_secret_in_an_address_is_left_out_and_its_weight_is_kept() -> None:
    data = "s3://h/a?access_key=AA&secret_key=SS=0.7 s3://u:pw@h/b?secret_key=TT=0.3"
    assert saved_config({"data": data})["data"] == "s3://h/a=0.7 s3://h/b=0.3"
    assert portable_config({"data": data})["data"] == "a=0.7 b=0.3"
    assert saved_config({"data": "s3://u:pw@h/b?secret_key=TT"})["data"] == "s3://h/b"
    assert "SS" not in saved_config({"data": "s3://h/a?secret_key=SS=x s3://h/b=1"})["data"]


def test_a_name_of_a_data_set_has_no_secret() -> None:
    """It is kept in checkpoints and tags, and stands in a card."""
    places = ["s3://h/a?access_key=AA&secret_key=SS", "s3://me:pw@bucket", "/data/b?c"]
    assert part_names(places) == ["a", "bucket", "b?c"]
    assert named_data(places[0]) == "a" and named_data(f"{places[0]}=1 {places[1]}=2") == "a=1 bucket=2"


def test_weights_keep_every_digit() -> None:
    assert saved_config({"data": "a=0.12344994 b=2"})["data"] == "a=0.12344994 b=2"


def test_a_tag_has_room_for_what_it_says_of_a_mixture() -> None:
    share = DataShare(name="tales", fingerprint="f" * 64, weight=0.25)
    assert json.loads(mixtures_text({"m": [share]})) == {
        "m": [{"name": "tales", "fingerprint": "f" * 64, "weight": 0.25}]
    }
    assert json.loads(mixtures_text({"m": [share] * 200})) == {"m": 200}
