"""What a sweep shows: a table on a terminal, lines elsewhere."""

import io
import pickle
import sys

import pytest
from ray import cloudpickle
from rich.console import Console

from tune.results import Trial, TrialStatus
from tune.shown.view import Lines, LiveTable, View, shown
from tune.trials import TrialEvents

RESULT = {"step": 3, "val_bits_per_byte": 1.25}


def tell(view: View) -> None:
    view.said("sweep s: 2 trials")
    view.started("lr0.1")
    view.validated("lr0.1", RESULT)
    view.validated("lr0.1", {"done": True})  # Tune's own last word
    view.started("lr0.2")
    view.validated("lr0.2", RESULT | {"val_bits_per_byte": 0.5})
    view.settled(Trial(point={"optim.lr": 0.1}, metrics=RESULT, status=TrialStatus.STOPPED, step=3))


def test_lines_say_each_validation_and_end(capsys: pytest.CaptureFixture[str]) -> None:
    with shown(2) as view:
        assert isinstance(view, Lines)
        tell(view)
    assert capsys.readouterr().err.splitlines() == [
        "sweep s: 2 trials",
        "  lr0.1  step 3  1.2500 bits per byte",
        "  lr0.2  step 3  0.5000 bits per byte",
        "  lr0.1  stopped at step 3 (1 of 2)",
    ]


def test_a_terminal_shows_a_table_with_the_best_first(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    with shown(2) as view:
        assert isinstance(view, LiveTable)
        tell(view)
    last = io.StringIO()
    Console(file=last, width=80).print(view.table())
    text = last.getvalue()
    assert "1 of 2 trials ended" in text
    rows = [line.split("│")[1:5] for line in text.splitlines() if "lr0" in line]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["lr0.2", "running", "3", "0.5000"], ["lr0.1", "stopped", "3", "1.2500"],
    ]  # fmt: skip
    assert "lr0.2" in terminal.getvalue()
    again = pickle.loads(cloudpickle.dumps(TrialEvents(view)))  # as Tune does before it starts
    assert isinstance(again, TrialEvents)
