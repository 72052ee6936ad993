"""What a run shows while it goes."""

import io
import re
import sys
from pathlib import Path

import pytest

from slm_ray.distributed import progress
from slm_ray.distributed.progress import duration, show_progress
from slm_ray.runs.history import History, Tail

STEP = {"step": 10, "train_loss": 2.5, "lr": 1e-3, "grad_norm": 0.5, "tokens_per_s": 1000.0, "tokens": 40960.0}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_lines_where_there_is_no_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    history = History(tmp_path / "metrics.jsonl")
    history.append({"message": "an older line"})
    with show_progress(history, max_steps=20):
        history.append({"message": "training from the start"})
        history.append(STEP)
        history.append({"step": 10, "val_loss": 2.25, "val_bits_per_byte": 0.8, "sample": "Once"})
        history.append(STEP | {"step": 20})
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "training from the start"
    assert lines[1].startswith("step 10/20  loss 2.5000")
    assert lines[2:4] == ["step 10/20  validation by windows 2.2500 nats, 0.8000 bits per byte", "    'Once'"]
    assert lines[4].startswith("step 20/20")  # the last step is always shown


def test_a_bar_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    history = History(tmp_path / "metrics.jsonl")
    with show_progress(history, max_steps=20):
        history.append(STEP)
    assert "10/20" in terminal.getvalue()
    assert "41 s left, loss 2.500, lr 1.0e-03, 1,000 tokens/s" in terminal.getvalue()


def test_each_line_is_given_once_also_where_a_restart_cuts_the_record_back(tmp_path: Path) -> None:
    history = History(tmp_path / "metrics.jsonl")
    tail = Tail(history.path)
    assert tail.new_lines() == []
    for step in range(1, 4):
        history.append({"step": step, "train_loss": 1.0 / step})
    with history.path.open("ab") as file:
        file.write(b'{"step": 4')  # not whole yet
    assert [line["step"] for line in tail.new_lines()] == [1, 2, 3]
    assert tail.new_lines() == []
    history.rewind(2)
    history.append({"step": 3, "train_loss": 1.0 / 3})  # again, and the same
    history.append({"step": 4, "train_loss": 0.25})
    assert [line["step"] for line in tail.new_lines()] == [4]


@pytest.mark.parametrize("is_terminal", [False, True], ids=["lines", "bar"])
def test_a_warning_that_happens_again_is_shown_again_and_says_when(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_terminal: bool
) -> None:
    terminal = Terminal() if is_terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(progress, "POLL_S", 0.01)
    history = History(tmp_path / "metrics.jsonl")
    with show_progress(history, max_steps=20):
        history.message("MLflow does not take the records")
        history.append(STEP)
        history.message("MLflow does not take the records")
        history.rewind(5)  # as workers do that start again
        history.message("MLflow does not take the records")
    lines = [line.strip() for line in terminal.getvalue().splitlines() if "MLflow" in line]
    assert lines[0] == "MLflow does not take the records"
    assert len(lines) == 3
    assert re.fullmatch(r"MLflow does not take the records \(2 times, the last at \d\d:\d\d:\d\d\)", lines[1])
    assert re.fullmatch(r"MLflow does not take the records \(3 times, the last at \d\d:\d\d:\d\d\)", lines[2])


def test_equal_lines_are_each_given_once(tmp_path: Path) -> None:
    history = History(tmp_path / "metrics.jsonl")
    tail = Tail(history.path)
    for _ in range(2):
        history.append({"message": "again"})
    assert tail.new_lines() == [{"message": "again"}] * 2
    history.rewind(0)  # the file is another one, with the same lines
    assert tail.new_lines() == []
    history.append({"message": "again"})
    assert tail.new_lines() == [{"message": "again"}]


def test_what_was_shown_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    history = History(tmp_path / "metrics.jsonl")
    history.append(STEP)
    tail = Tail(history.path)
    assert tail.new_lines() == [STEP]
    before = history.path.read_bytes()
    history.path.write_bytes(b"x" * (len(before) - 1) + b"\n")  # as long, so that reading it again would show
    history.append(STEP | {"step": 20})
    assert tail.new_lines() == [STEP | {"step": 20}]


def test_nothing_when_quiet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    history = History(tmp_path / "metrics.jsonl")
    with show_progress(history, max_steps=20, is_quiet=True):
        history.append(STEP)
    assert capsys.readouterr().err == ""


def test_the_share_of_the_machines_peak_and_the_time_left_are_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    history = History(tmp_path / "metrics.jsonl")
    with show_progress(history, max_steps=20):
        history.append(STEP | {"mfu": 0.412})
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "step 10/20  loss 2.5000  lr 1.00e-03  gradient 0.50  1,000 tokens/s  41% of peak  41 s left"


def test_the_time_left_is_what_was_seen_validations_included(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 102.0, 140.0, 150.0, 190.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    pace = progress._Pace(max_steps=100)
    lines = [STEP | {"step": step, "tokens": 1000.0 * step, "tokens_per_s": 500.0} for step in (10, 20, 50, 20, 30)]
    assert pace.left(lines[0]) == "3 min left"  # 90 steps of 2 s by the workers' own figure
    assert pace.left(lines[1]) == "3 min left"  # too soon to say otherwise
    assert pace.left(lines[2]) == "50 s left"  # 40 steps in 40 s
    assert pace.left(lines[3]) == "3 min left"  # 40 steps in 50 s after a restart: still seen
    assert pace.left(lines[4]) == "5 min left"


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "0 s"), (89, "89 s"), (90, "2 min"), (89 * 60, "89 min"), (11_100, "3 h 05 min"), (1e6, "277 h 47 min")],
)
def test_times_are_said_as_one_would(seconds: float, said: str) -> None:
    assert duration(seconds) == said
