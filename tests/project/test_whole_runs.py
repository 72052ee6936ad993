"""The benches that start whole runs: what they make of the lines of a run, and an ensemble's loss."""

import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from slm_ray.config.schema import IGNORED_TARGET, ModelConfig
from slm_ray.model.decoder import Decoder
from tests.support.benches import learning_bench

RUNS = learning_bench("product_runs")
HOUR = learning_bench("hour")
TEACHERS = learning_bench("teachers")


def test_a_run_is_judged_by_its_best_validation_and_timed_without_its_first_lines() -> None:
    speeds = [(10, 3.0), (20, 4.0), (30, 100.0), (40, 120.0), (50, 110.0)]
    lines = [{"step": step, "tokens": step * 64, "tokens_per_s": speed} for step, speed in speeds]
    judged = [{"step": 30, "val_bits_per_byte": 0.7}, {"step": 50, "val_bits_per_byte": 0.8}]
    run = RUNS.Run(Path("run"), [{"message": "samples"}, *lines, *judged], 60.0)
    assert (run.best["step"], run.tokens_per_s, run.steps, run.tokens) == (30, 110.0, 50, 3200)


def test_an_hour_has_room_for_the_start_and_the_validations() -> None:
    steps = HOUR.steps_within(60, 0.5)
    assert steps * 0.5 + HOUR.START_S <= 3600 * (1 - HOUR.SPARE) < (steps + 1) * 0.5 + HOUR.START_S
    assert HOUR.steps_within(1, 0.5) < 1


def test_a_run_of_a_few_lines_has_a_speed_too() -> None:
    lines = [{"step": step, "tokens": step, "tokens_per_s": 5.0} for step in (1, 2)]
    assert RUNS.Run(Path("run"), lines, 1.0).tokens_per_s == 5.0


@pytest.mark.parametrize("minutes", ["1", "0", "-5", "nan", "inf"])
def test_an_hour_too_short_to_begin_is_refused(
    minutes: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["hour.py", f"--minutes={minutes}"])
    assert HOUR.main() == 2
    assert capsys.readouterr().err.startswith(f"error: --minutes {minutes}: ")


def test_a_step_that_does_not_fit_is_no_whole_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    probe = RUNS.Run(Path("run"), [{"step": 1, "tokens": 4096, "tokens_per_s": 10.0}], 1.0)
    monkeypatch.setattr(HOUR, "train", lambda *_: probe)
    with pytest.raises(SystemExit, match="2"):
        HOUR._row("fp32", "data", 2.0, Path("out"), [])


@pytest.mark.parametrize("script", [HOUR, TEACHERS])
@pytest.mark.parametrize("option", ["--data", "--max_steps", "--output=x", "--name", "--config"])
def test_options_that_the_bench_decides_are_refused_before_it_begins(
    script: ModuleType, option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench.py", "--", option, "x"])
    with pytest.raises(SystemExit, match="2"):
        script.main()
    assert "the bench decides it" in capsys.readouterr().err


@pytest.mark.parametrize("weights", [["1.5"], ["0"], ["0.5", "0.5"]])
def test_weights_that_no_run_would_take_are_refused_before_the_teachers_are_trained(
    weights: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["teachers.py", "--weights", *weights])
    assert TEACHERS.main() == 2
    assert capsys.readouterr().err.startswith("error: --weights ")


@pytest.mark.parametrize("number", [1, 2, 3])
def test_the_loss_of_an_ensemble_is_that_of_the_mean_of_its_probabilities(number: int) -> None:
    shape = ModelConfig(vocab_size=11, seq_len=8, n_layers=1, d_model=8, n_heads=2, d_ff=16, init_std=0.5)
    torch.manual_seed(0)
    models = [Decoder(shape).eval() for _ in range(number)]
    tokens = torch.randint(11, (3, 5))
    targets = torch.randint(11, (3, 5))
    targets[1, 2] = IGNORED_TARGET
    with torch.no_grad():
        found = TEACHERS.Ensemble(models)(tokens, targets).item()
        probabilities = torch.stack([model(tokens).softmax(-1) for model in models]).mean(0)  # (B, T, vocab_size)
    counted = [(row, place) for row in range(3) for place in range(5) if (row, place) != (1, 2)]
    wanted = -sum(math.log(probabilities[row, place, targets[row, place]]) for row, place in counted)
    assert math.isclose(found, wanted, rel_tol=1e-5)
