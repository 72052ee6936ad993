"""Rungs and rounds: who goes on follows from the values alone, not from who ends first."""

import dataclasses
import itertools
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from slm_ray.config.schema import TrainConfig
from slm_ray.errors import UserError
from slm_ray.runs.history import History
from slm_ray.runs.outcome import RunStatus, RunSummary, write_summary
from slm_ray.runs.run_folder import RunFolder
from slm_ray.runs.train_state import Evaluation
from tune import outcomes as outcomes_module
from tune.config import SweepConfig
from tune.halving import first_rung, promoted, rung_steps
from tune.planning import plan_sweep
from tune.results import Trial, TrialStatus, csv_table, ranked
from tune.rounds import Rounds, run_rounds
from tune.shown.view import Lines
from tune.space import Point


def test_rungs_are_steps_with_a_validation_and_end_with_the_trial() -> None:
    assert rung_steps(200, 23, 3) == (23, 69, 200)
    assert rung_steps(4, 1, 3) == (1, 3, 4)
    assert rung_steps(5, 10, 3) == (5,)
    assert (first_rung(200, 3, 0), first_rung(200, 3, 10), first_rung(4, 3, 0)) == (23, 30, 1)


@hypothesis.given(st.dictionaries(st.text(), st.floats(0, 9) | st.just(float("inf")), min_size=1), st.randoms())
def test_the_best_third_goes_on_whatever_the_order(values: dict[str, float], chance: random.Random) -> None:
    going = promoted(values, {}, 3)
    assert len(going) <= max(1, len(values) // 3)
    assert all(values[name] < float("inf") for name in going)
    worst = max((values[name] for name in going), default=0.0)
    assert all(values[name] >= worst for name in values.keys() - set(going)) or not going
    shuffled = list(values.items())
    chance.shuffle(shuffled)
    if len(set(values.values())) == len(values):  # without ties
        assert set(promoted(dict(shuffled), {}, 3)) == set(going)


def test_a_later_batch_is_compared_with_all_that_came_before() -> None:
    assert promoted({"c": 2.0, "d": 0.5}, {"a": 1.0, "b": 3.0}, 2) == ["d"]
    assert promoted({"c": 2.0, "d": 2.5}, {"a": 1.0, "b": 1.5}, 2) == []


class Trials:
    """Trials whose folders are written as a training would write them, without one."""

    def __init__(self, crash: Mapping[str, int], chance: random.Random) -> None:
        self.crashes, self.chance, self.steps_run = dict(crash), chance, 0
        self.die_after = 10**9

    def run(self, configs: Mapping[str, TrainConfig], until: int) -> dict[str, str]:
        failures = {}
        names = list(configs)
        self.chance.shuffle(names)
        for name in names:
            if self.crashes.get(name, 0) > 0:
                self.crashes[name] -= 1
                failures[name] = "crashed"
                continue
            self._train(configs[name], until)
        return failures

    def _train(self, config: TrainConfig, until: int) -> None:
        folder = RunFolder(Path(config.output) / config.name)
        folder.path.mkdir(parents=True, exist_ok=True)
        history = History(folder.path / outcomes_module.HISTORY)
        done = max(history.series("val_loss")[0], default=0)
        score = abs(config.optim.lr - 0.003) * 100 + 10 / config.model.d_ff
        for step in range(done + config.eval_interval_steps, until + 1, config.eval_interval_steps):
            if self.die_after <= 0:
                raise KeyboardInterrupt
            self.die_after -= 1
            self.steps_run += config.eval_interval_steps
            value = score + 1 / step
            history.append({"step": step, "val_loss": value, "val_bits_per_byte": value})
        best = Evaluation(val_loss=score + 1 / until, val_bits_per_byte=score + 1 / until, step=until)
        status = RunStatus.STOPPED if until < config.max_steps else RunStatus.FINISHED
        if config.optim.lr > 1:
            status = RunStatus.DIVERGED
        write_summary(
            folder,
            RunSummary(
                status=status, reason="", step=until, max_steps=config.max_steps, metrics=best, best=best, run_id="r"
            ),
        )


def sweep_rounds(config: TrainConfig, trials: Trials, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Rounds:
    monkeypatch.setattr(RunFolder, "latest_valid", lambda self: self)  # there are no checkpoints
    own = {field.name: getattr(config, field.name) for field in dataclasses.fields(TrainConfig)}
    fields: dict[str, Any] = {
        "lr": (1e-3, 3e-3, 1e-2), "d_ff": (32, 64, 96), "scheduler": "asha", "trial_steps": 18,
        "eval_interval_steps": 2, "tracking_uri": "none", "register": "",
    }  # fmt: skip
    plan = plan_sweep(SweepConfig(**(own | fields | changes)))
    kept: list[Any] = []

    def record(batches: Any) -> None:
        kept[:] = [list(batch) for batch in batches]

    return Rounds(
        searcher=plan.searcher, rungs=plan.rungs, factor=plan.sweep.reduction_factor, retries=plan.sweep.trial_retries,
        trial_config=plan.trial_config, run=trials.run, recorded=kept, record=record, view=Lines(plan.n_trials),
    )  # fmt: skip


def fingerprint(trials: list[Trial]) -> str:
    return csv_table(ranked(trials))


@pytest.mark.parametrize("search", ["grid", "random", "optuna"])
def test_a_sweep_that_is_killed_anywhere_and_goes_on_ends_with_the_same_table(
    search: str, tiny_config: TrainConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """At every validation in turn, and trials end in another order each time."""
    changes: dict[str, Any] = {"search": search, "num_trials": 0 if search == "grid" else 7}
    whole = Trials({}, random.Random(0))
    rounds = sweep_rounds(tiny_config, whole, monkeypatch, **changes)
    expected = fingerprint(run_rounds(rounds))
    assert expected.count("finished") >= 1
    assert expected.count("stopped") >= 4
    for cut in itertools.count(1, 3):
        config = dataclasses.replace(tiny_config, output=str(tmp_path / f"runs-{cut}"))
        struck = Trials({}, random.Random(cut))
        struck.die_after = cut
        rounds = sweep_rounds(config, struck, monkeypatch, **changes)
        try:
            assert fingerprint(run_rounds(rounds)) == expected
            break  # it came to its end before
        except KeyboardInterrupt:
            struck.die_after = 10**9
        again = sweep_rounds(config, struck, monkeypatch, **changes)
        again = dataclasses.replace(again, recorded=rounds.recorded if search == "optuna" else ())
        assert fingerprint(run_rounds(again)) == expected
        assert struck.steps_run == whole.steps_run  # nothing twice


def test_nine_trials_become_three_and_one_and_most_steps_are_saved(
    tiny_config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials = Trials({}, random.Random(0))
    rounds = sweep_rounds(tiny_config, trials, monkeypatch)
    assert rounds.rungs == (2, 6, 18)
    found = ranked(run_rounds(rounds))
    assert [(trial.status, trial.step) for trial in found] == [
        (TrialStatus.FINISHED, 18), *[(TrialStatus.STOPPED, 6)] * 2, *[(TrialStatus.STOPPED, 2)] * 6,
    ]  # fmt: skip
    assert found[0].point == {"optim.lr": 3e-3, "model.d_ff": 96}
    assert trials.steps_run == 9 * 2 + 3 * 4 + 12


def test_a_crash_is_tried_again_and_then_marked_and_a_diverged_trial_is_not_run_again(
    tiny_config: TrainConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"lr": (1e-3, 2.0), "d_ff": (32, 64), "scheduler": "none"}
    trials = Trials({"lr0.001-dff32": 1, "lr0.001-dff64": 2}, random.Random(0))
    rounds = sweep_rounds(tiny_config, trials, monkeypatch, **changes)
    assert rounds.rungs == (18,)
    found = {trial.name: trial for trial in run_rounds(rounds)}
    assert found["lr0.001-dff32"].status == TrialStatus.FINISHED
    assert (found["lr0.001-dff64"].status, found["lr0.001-dff64"].reason) == (TrialStatus.FAILED, "crashed")
    assert found["lr2-dff32"].status == TrialStatus.DIVERGED
    assert trials.steps_run == 18 * 3
    assert "2 failed and are tried again: lr0.001-dff32, lr0.001-dff64" in capsys.readouterr().err
    again = {trial.name: trial.status for trial in run_rounds(rounds)}
    assert again["lr0.001-dff64"] == TrialStatus.FINISHED
    assert trials.steps_run == 18 * 4


def test_trials_that_neither_end_nor_fail_were_interrupted(
    tiny_config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds = sweep_rounds(tiny_config, Trials({}, random.Random(0)), monkeypatch)
    with pytest.raises(UserError, match="9 of 9 trials did not come to their end: --resume goes on"):
        run_rounds(dataclasses.replace(rounds, run=lambda *_: {}))


def test_points_of_a_record_come_first(tiny_config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = sweep_rounds(
        tiny_config, Trials({}, random.Random(0)), monkeypatch, search="optuna", num_trials=5, batch_trials=2
    )
    first: list[Point] = [{"optim.lr": 1e-3, "model.d_ff": 64}, {"optim.lr": 1e-2, "model.d_ff": 64}]
    found = run_rounds(dataclasses.replace(rounds, recorded=[first]))
    assert [trial.point for trial in found[:2]] == first
    assert len({trial.name for trial in found}) == 5
