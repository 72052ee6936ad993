"""Which jobs go on in one staging folder."""

from collections.abc import Callable
from pathlib import Path

import pytest

from slm_ray.preparation import staging


def key() -> str:
    return staging.job_key("digest", {"seed": 1})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("_code_digest", lambda: "other code"),
        ("_version", lambda _: "other version"),
    ],
)
def test_another_version_of_the_program_does_not_go_on_with_what_this_one_began(
    name: str, value: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = key()
    assert key() == before
    monkeypatch.setattr(staging, name, value)
    assert key() != before


@pytest.mark.parametrize(
    ("name", "decides"),
    [("sources/rows.py", True), ("storage.py", True), ("training/loop.py", False), ("train.py", False)],
)
def test_the_code_that_makes_the_bytes_counts_and_no_other(
    name: str, decides: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("LONGEST = 1\n")
    monkeypatch.setattr(staging, "PACKAGE", tmp_path)
    before = key()
    (tmp_path / name).write_text("LONGEST = 2  # other\n")
    assert (key() != before) == decides


def test_every_room_that_decides_is_there() -> None:
    assert [name for name in staging.DECIDING_CODE if not (staging.PACKAGE / name).exists()] == []
