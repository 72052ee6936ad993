"""Which jobs go on in one staging folder."""

from collections.abc import Callable

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


def test_the_code_counts_whole(tmp_path, monkeypatch):
    (tmp_path / "text.py").write_text("LONGEST = 1\n")
    monkeypatch.setattr(staging.resources, "files", lambda _: tmp_path)
    before = key()
    (tmp_path / "text.py").write_text("LONGEST = 2\n")
    assert key() != before
