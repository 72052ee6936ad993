"""The record of a run on a disk that does not take it."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from slm_ray.runs.history import History


@pytest.fixture
def is_full(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the disk is; it takes half of a line then."""
    state = [False]
    opened = Path.open

    class Full:
        def __init__(self, file: Any) -> None:
            self._file = file

        def __enter__(self) -> "Full":
            return self

        def __exit__(self, *_: object) -> None:
            self._file.close()

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

        def write(self, content: bytes) -> int:
            half: int = self._file.write(content[: len(content) // 2])
            return half

    def open_it(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        file = opened(path, mode, *args, **options)
        return Full(file) if state[0] and mode == "ab" else file

    monkeypatch.setattr(Path, "open", open_it)
    return state


def test_lines_that_the_disk_did_not_take_are_told_of_once_in_the_record(tmp_path: Path, is_full: list[bool]) -> None:
    """The record is all that the driver sees; each look at it is a `History` of its own."""
    path = tmp_path / "metrics.jsonl"
    History(path).append({"step": 1})
    is_full[0] = True
    for step in (2, 3):
        History(path).append({"step": step})
    History(path).message("saved")
    is_full[0] = False
    for step in (5, 6):
        History(path).append({"step": step})
    found = list(History(path).lines())
    assert [line["step"] for line in found if "step" in line] == [1, 5, 6]
    said = "metrics.jsonl misses 3 line(s) before this one: the disk did not take them"
    assert [line["message"] for line in found if "message" in line] == [said]
    assert path.read_bytes().count(b"\n") == len(found)  # no half of a line


def test_another_record_is_not_told_of_it(tmp_path: Path, is_full: list[bool]) -> None:
    is_full[0] = True
    History(tmp_path / "one.jsonl").append({"step": 1})
    is_full[0] = False
    History(tmp_path / "other.jsonl").append({"step": 1})
    assert list(History(tmp_path / "other.jsonl").lines()) == [{"step": 1}]


def test_a_message_that_finds_no_room_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    history = History(tmp_path / "metrics.jsonl")
    write = History._write
    refused = iter([True, False, True, False, True, False, False])

    def now_and_then(self: History, line: dict[str, Any]) -> None:
        if next(refused):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, line)

    monkeypatch.setattr(History, "_write", now_and_then)
    for step in (1, 2, 3, 4):
        history.append({"step": step})  # 1 is missing, then the message that says so, twice
    messages = [line["message"] for line in history.lines() if "message" in line]
    assert [text[:32] for text in messages] == ["metrics.jsonl misses 1 line(s) b"]
    assert [line["step"] for line in history.lines() if "step" in line] == [2, 3, 4]
    assert caplog.text.count("misses a line") == 1
