"""`summary.json`: what comes back, here and from earlier versions."""

import json
from pathlib import Path

import pytest

from slm_ray.errors import UserError
from slm_ray.model_files.json_files import MAX_JSON_BYTES
from slm_ray.runs import outcome
from slm_ray.runs.outcome import RunStatus, RunSummary
from slm_ray.runs.run_folder import RunFolder
from slm_ray.runs.train_state import Evaluation

BEST = Evaluation(val_loss=2.0, val_perplexity=7.4, val_bits_per_byte=0.9, step=4)
LAST = Evaluation(val_loss=2.5, val_perplexity=12.2, val_bits_per_byte=1.1, step=8)


@pytest.mark.parametrize("best", [BEST, None])
@pytest.mark.parametrize("status", RunStatus)
def test_what_was_written_comes_back(best: Evaluation | None, status: RunStatus, tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    summary = RunSummary(status=status, reason="", step=8, max_steps=8, metrics=LAST, best=best, run_id="r")
    assert not outcome.has_summary(run)
    outcome.write_summary(run, summary)
    assert outcome.has_summary(run)
    assert outcome.read_summary(run) == summary
    outcome.clear_outcome(run)
    assert list(tmp_path.iterdir()) == []


def test_a_summary_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    last = {"val_loss": 2.5, "val_perplexity": 12.2, "val_bits_per_byte": 1.1}
    best = {"step": 4.0, "val_loss": 2.0, "val_perplexity": 7.4, "val_bits_per_byte": 0.9}
    content = {
        "status": "finished",
        "reason": "",
        "step": 8,
        "max_steps": 8,
        "metrics": last,
        "best": best,
        "run_id": "",
    }
    (tmp_path / "summary.json").write_text(json.dumps(content))
    found = outcome.read_summary(RunFolder(tmp_path))
    assert (found.status, found.metrics, found.best) == (RunStatus.FINISHED, LAST, BEST)
    (tmp_path / "summary.json").write_text(json.dumps(content | {"metrics": {}, "best": {}, "status": "diverged"}))
    found = outcome.read_summary(RunFolder(tmp_path))
    assert (found.status, found.metrics, found.best) == (RunStatus.DIVERGED, None, None)
    del content["reason"]
    (tmp_path / "summary.json").write_text(json.dumps(content))
    assert outcome.read_summary(RunFolder(tmp_path)).reason == ""
    (tmp_path / "summary.json").write_text('{"status": "asleep"}')
    with pytest.raises(UserError, match="is no summary that this version reads"):
        outcome.read_summary(RunFolder(tmp_path))


def test_workers_that_left_nothing_are_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give an --output that all nodes share"):
        outcome.read_summary(RunFolder(tmp_path))


@pytest.mark.parametrize(
    "change",
    [
        {"step": "8"},
        {"step": [8]},
        {"max_steps": None},
        {"max_steps": 1e999},
        {"run_id": 5},
        {"reason": {}},
        {"best": [1]},
        {"best": {"val_loss": 1.0, "step": 1e999}},
        {"metrics": "none"},
        {"status": []},
        {"more": 1},
    ],
)
def test_a_summary_of_odd_types_is_one_line(change: dict[str, object], tmp_path: Path) -> None:
    summary = RunSummary(status=RunStatus.FINISHED, reason="", step=8, max_steps=8, metrics=LAST, best=BEST, run_id="r")
    (tmp_path / "summary.json").write_text(json.dumps(json.loads(summary.to_json()) | change))
    with pytest.raises(UserError, match="is no summary that this version reads"):
        outcome.read_summary(RunFolder(tmp_path))


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "3", "\ufeff{}", '{"a": "' + "x" * MAX_JSON_BYTES + '"}'])
def test_a_summary_that_is_none_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(text)
    with pytest.raises(UserError, match="is no summary that this version reads"):
        outcome.read_summary(RunFolder(tmp_path))
    (tmp_path / "summary.json").unlink()
    (tmp_path / "summary.json").mkdir()
    with pytest.raises(UserError, match="cannot be read"):
        outcome.read_summary(RunFolder(tmp_path))
