"""Places and names of a config as others may see them."""

from pathlib import Path

import pytest

from slm_ray.config.places import model_name_fault, portable_config, saved_config, typed_config
from slm_ray.config.schema import TrainConfig

CONFIG = {
    "data": "/home/me/p/data/x",
    "output": "/home/me/runs",
    "tracking_uri": "http://me:pw@host",
    "name": "a",
}


def test_what_is_saved_has_no_password_and_what_is_given_away_no_place() -> None:
    assert saved_config(CONFIG) == CONFIG | {"tracking_uri": "http://host"}
    assert portable_config(CONFIG) == {"data": "x", "name": "a"}
    assert portable_config({"data": "s3://bucket/sets/x"}) == {"data": "x"}
    taught = {"teacher": ["/home/me/runs/t/best", "hub:a/b"], "teacher_weight": 0.5}
    assert portable_config(taught) == {"teacher": ["best", "hub:a/b"], "teacher_weight": 0.5}
    assert saved_config({}) == portable_config({}) == {}


def test_what_was_typed_below_the_working_folder_is_as_seen_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = CONFIG | {"data": str(tmp_path / "data" / "x"), "output": "s3://bucket/runs"}
    assert typed_config(config) == config | {"data": "data/x", "tracking_uri": "http://host"}


@pytest.mark.parametrize("name", ["a/b", "a:b", "a@b", " a", "a ", ".", "..", "a\nb", "x" * 201])
def test_a_name_that_cannot_be_registered_is_refused_with_the_options(name: str) -> None:
    assert model_name_fault(name)
    with pytest.raises(ValueError, match=r"register .* must be a name"):
        TrainConfig(register=name)


@pytest.mark.parametrize("name", ["", "it's", "a b", "Mäuse", "a.b"])
def test_other_names_are_taken(name: str) -> None:
    assert TrainConfig(register=name).register == name
