"""Which jobs go on in one staging folder."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from slm_ray import storage
from slm_ray.dataset import shards
from slm_ray.dataset.manifest import Manifest, Shard, Split
from slm_ray.errors import UserError
from slm_ray.preparation import cleaned_files, staging, summary_files
from slm_ray.preparation.resume import Completed
from slm_ray.sources.input_files import InputFile, InputRange
from slm_ray.sources.plain_text import PlainText
from slm_ray.sources.plan import plan_source


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


def test_what_cannot_be_read_now_is_neither_damaged_nor_absent(tmp_path, monkeypatch):
    """A stale handle of a network disk was taken for a range that is not finished, or a data set that is damaged."""
    (tmp_path / "ranges").mkdir()
    (tmp_path / "ranges" / "00000.json").write_text("{}")
    (tmp_path / "cleaned").mkdir()
    (tmp_path / "cleaned" / "00000.arrow").write_bytes(b"x")
    assert summary_files.load_summary(tmp_path / "ranges" / "00000.json") is None

    def stale(*_: object, **__: object) -> bytes:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(Path, "read_text", stale)
    monkeypatch.setattr(Path, "read_bytes", stale)
    monkeypatch.setattr(Path, "open", stale)
    with pytest.raises(OSError, match="Stale"):
        Completed.of(tmp_path)
    with pytest.raises(shards.UnreadableError, match="Stale file handle; try again"):
        shards.checked_content(tmp_path / "ranges" / "00000.json", "")
    part = InputRange(number=0, file=InputFile(format=PlainText(), name="a", path="a"), first_row=0, n_rows=1)
    with pytest.raises(UserError, match="Stale file handle; run again"):
        cleaned_files.load_cleaned(part, str(tmp_path))


def test_an_object_store_that_does_not_answer_is_not_empty(monkeypatch):
    folder = storage.storage_path("memory://quiet/data")
    (folder / "a").write_bytes(b"x")
    assert storage.exists(folder) and storage.exists(folder / "a") and not storage.exists(folder / "b")

    def silent(*_: object, **__: object) -> None:
        raise TimeoutError("no answer")

    monkeypatch.setattr(type(folder.fs), "info", silent)
    for look in (lambda: staging.finish_publishing(folder), lambda: list(storage.files_below(folder))):
        with pytest.raises(TimeoutError):
            look()


def test_a_folder_that_cannot_be_read_is_not_passed_over(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"cannot read .*closed: Permission denied"):
        plan_source(str(tmp_path))


def test_a_staging_folder_that_is_half_removed_is_not_published_again(monkeypatch):
    """In a store it is removed file by file; the finished data set lost the shards that were gone there already."""
    output = storage.storage_path("memory://half/data")
    staged = output / staging.STAGING / "key"
    names = ["train/00000.parquet", "train/00001.parquet"]
    for name in (*names, "tokenizer.json"):
        (staged / name).write_bytes(b"x")
    train = Split.of(tuple(Shard(file=name, rows=1, tokens=1, bytes=1, sha256="") for name in names))
    splits = {"train": train, "validation": Split.of(()), "test": Split.of(())}
    made = Manifest(
        format_version=1, source={}, parameters={}, tokenizer={}, splits=splits, rejected=Split.of(()), counts={},
        fingerprint="x",
    )  # fmt: skip

    remove = storage.remove

    def killed(path: storage.StoragePath) -> None:
        if path.name != staging.STAGING:
            return remove(path)
        (staged / names[0]).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(storage, "remove", killed)
        staging.publish(output, staged, made)
    for _ in range(2):
        staging.finish_publishing(output)
    assert all(storage.exists(output / name) for name in (*names, "manifest.json"))
