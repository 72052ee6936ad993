"""Which commit is recorded, and where none is."""

import subprocess
from pathlib import Path

import pytest

from slm_ray.runs import code_version
from slm_ray.runs.code_version import CodeVersion, version_of


def git(folder: Path, *words: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *who, "-C", str(folder), *words], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    git(tmp_path, "init", "--quiet")
    (tmp_path / "code.py").write_text("1\n")
    git(tmp_path, "add", "code.py")
    git(tmp_path, "commit", "--quiet", "-m", "one")
    return tmp_path


def test_a_commit_is_dirty_with_changes_and_clean_beside_other_files(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_DIR", "elsewhere")  # as in a hook
    with monkeypatch.context() as patch:
        patch.delenv("GIT_DIR")
        commit = git(checkout, "rev-parse", "HEAD")
    (checkout / "runs.txt").write_text("no code\n")
    assert version_of(checkout, "code.py") == CodeVersion(commit=commit, is_dirty=False)
    (checkout / "code.py").write_text("2\n")
    dirty = version_of(checkout, "code.py")
    assert dirty == CodeVersion(commit=commit, is_dirty=True)
    assert dirty.tags == {"mlflow.source.git.commit": commit, "mlflow.source.git.dirty": "true"}


def test_a_package_installed_into_a_project_is_not_that_project(checkout: Path) -> None:
    (checkout / "installed.py").write_text("1\n")
    assert version_of(checkout, "installed.py") is None


def test_without_a_checkout_or_a_commit_there_is_none(tmp_path: Path) -> None:
    assert version_of(tmp_path, "code.py") is None
    git(tmp_path, "init", "--quiet")
    (tmp_path / "code.py").write_text("1\n")
    assert version_of(tmp_path, "code.py") is None


def test_a_git_that_cannot_be_asked_is_said_without_a_place(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", "")
    assert version_of(checkout, "code.py") is None
    assert "git cannot be asked (it is not installed)" in caplog.text
    assert str(checkout) not in caplog.text


def test_the_version_of_this_process_is_asked_once() -> None:
    assert code_version.code_version() is code_version.code_version()
