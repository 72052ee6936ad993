"""The profile of a few steps."""

import dataclasses
import gzip
import json
import re

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from slm_ray.config.schema import TrainConfig
from slm_ray.tracking.tracker import NullTracker
from slm_ray.training.context import TrainContext
from slm_ray.training.inputs import TrainInputs, load_inputs
from slm_ray.training.loop import fit
from slm_ray.training.preflight import resolve
from slm_ray.training.profiling import recording
from slm_ray.training.profiling.recording import read_tables, window

PLUGIN_LOOKS_FOR = re.compile(r"^(.*?)(\.\d+)?\.pt\.trace\.json(?:\.gz)?$")
"""`consts.WORKER_PATTERN` of torch-tb-profiler 0.4.3, which looks in every folder below the log folder."""


class Kept(NullTracker):
    """Remembers which files it was given."""

    def __init__(self) -> None:
        self.files: list[tuple[str, str]] = []

    def log_file(self, path, folder="") -> None:  # type: ignore[no-untyped-def]
        self.files.append((folder, path.name))


@pytest.fixture
def inputs(tiny_config: TrainConfig) -> TrainInputs:
    config = dataclasses.replace(tiny_config, profile=True, max_steps=8, sample_prompt="", workers=1)
    return load_inputs(resolve(config, lambda _: 1), Kept())


def messages(inputs: TrainInputs) -> list[str]:
    return [line["message"] for line in inputs.history.lines() if "message" in line]


def test_a_run_leaves_a_trace_and_a_table_of_its_steps(inputs: TrainInputs) -> None:
    fit(inputs, TrainContext())
    trace = json.loads((inputs.folder.path / recording.TRACE).read_text(encoding="utf-8"))
    names = [event.get("name", "") for event in trace["traceEvents"]]
    assert sum(name.startswith("Optimizer.step#") for name in names) == recording.N_STEPS
    assert {name for name in names if name.startswith("ProfilerStep#")} == {f"ProfilerStep#{n}" for n in (6, 7, 8)}
    (copy,) = [path for path in inputs.folder.path.rglob("*") if PLUGIN_LOOKS_FOR.search(path.name)]
    assert json.loads(gzip.decompress(copy.read_bytes())) == trace
    by_part = (inputs.folder.path / recording.PARTS).read_text(encoding="utf-8")
    table = (inputs.folder.path / recording.OPERATORS).read_text(encoding="utf-8")
    assert read_tables(inputs.folder.path) == f"{by_part}\n{table}"
    assert_has_parts(by_part)
    columns, *rows = [line.split("  ") for line in table.splitlines() if line.strip() and not line.startswith("---")]
    assert {"Name", "Self CPU", "# of Calls"} <= {name.strip() for name in columns}
    names = [row[0].strip() if row[0].strip() else row[1].strip() for row in rows]
    assert "aten::mm" in table or "aten::addmm" in table
    assert recording.N_ROWS <= len(names) <= recording.N_ROWS + 1  # and the sum
    assert table.rstrip().splitlines()[-1].startswith("Self CPU time total: ")
    assert inputs.tracker.files == [("profile", f"{name}") for name in ("trace.json", "parts.txt", "operators.txt")]
    assert any(message.startswith("profiled steps 6 to 8: ") for message in messages(inputs))


def assert_has_parts(table: str) -> None:
    """A row for each part, whose times and shares sum to the whole; products have a rate."""
    _, *rows = [re.split(r" {2,}", line.strip()) for line in table.splitlines()]
    times = {row[0]: float(row[1]) for row in rows}
    whole = times.pop("the whole step, by the model's FLOPs")
    passes = {"linear layers", "attention", "output layer and loss", "the rest"}
    assert {f"forward: {kind}" for kind in passes} < set(times)
    assert {f"backward: {kind}" for kind in passes - {"output layer and loss"}} < set(times)
    assert {"data", "clipping", "AdamW", "other"} < set(times)
    assert sum(times.values()) == pytest.approx(whole, abs=0.05 * len(times))
    assert all(len(row) == 5 for row in rows if row[0].endswith("linear layers"))


def test_a_run_without_the_option_records_nothing(inputs: TrainInputs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.profiler, "profile", lambda **_: pytest.fail("recorded"))
    plain = dataclasses.replace(inputs, config=dataclasses.replace(inputs.config, profile=False))
    fit(plain, TrainContext())
    assert read_tables(inputs.folder.path) == ""


def test_a_profile_that_fails_does_not_end_the_training(inputs: TrainInputs, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: object) -> None:
        raise RuntimeError("no profiler here")

    monkeypatch.setattr(torch.profiler, "profile", fail)
    assert fit(inputs, TrainContext()).status == "finished"
    assert "no profile, the run goes on without: RuntimeError('no profiler here')" in messages(inputs)


def test_a_run_of_one_step_says_that_it_is_too_short(inputs: TrainInputs) -> None:
    fit(dataclasses.replace(inputs, max_steps=1), TrainContext())
    assert "no profile: there are too few steps left" in messages(inputs)


@given(st.integers(0, 300), st.integers(1, 300), st.integers(1, 60))
def test_the_window_lies_ahead_and_between_two_validations(first: int, left: int, interval: int) -> None:
    start, stop = window(first, first + left, interval)
    assert start > first
    if left >= 2:
        assert start < stop <= min(first + left, start + recording.N_STEPS)
        assert stop <= (start // interval + 1) * interval
    else:
        assert start >= stop
    if interval >= recording.N_STEPS and left >= 2 * (recording.WARM_UP_STEPS + interval):
        assert stop - start == recording.N_STEPS
        assert start >= first + recording.WARM_UP_STEPS
