"""What a run shows while it goes."""

import io
import sys
from pathlib import Path

import pytest

from slm_ray.history import History
from slm_ray.progress import watch

STEP = {"step": 10, "train_loss": 2.5, "lr": 1e-3, "grad_norm": 0.5, "tokens_per_s": 1000.0, "tokens": 40960.0}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_lines_where_there_is_no_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    history = History(tmp_path / "metrics.jsonl")
    history.append({"message": "an older line"})
    with watch(history, max_steps=20):
        history.append({"message": "training from the start"})
        history.append(STEP)
        history.append({"step": 10, "val_loss": 2.25, "val_bits_per_byte": 0.8, "sample": "Once"})
        history.append(STEP | {"step": 20})
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "training from the start"
    assert lines[1].startswith("step 10/20  loss 2.5000")
    assert lines[2:4] == ["step 10/20  validation 2.2500 nats, 0.8000 bits per byte", "    'Once'"]
    assert lines[4].startswith("step 20/20")  # the last step is always shown


def test_a_bar_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    history = History(tmp_path / "metrics.jsonl")
    with watch(history, max_steps=20):
        history.append(STEP)
    assert "10/20" in terminal.getvalue()
    assert "loss 2.500" in terminal.getvalue()


def test_nothing_when_quiet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    history = History(tmp_path / "metrics.jsonl")
    with watch(history, max_steps=20, is_quiet=True):
        history.append(STEP)
    assert capsys.readouterr().err == ""
