"""The figures beside the loss."""

import dataclasses
import mmap
import sys

import pytest
import torch

from slm_ray.config.schema import TrainConfig
from slm_ray.tracking.tracker import NullTracker
from slm_ray.training import metrics
from slm_ray.training.context import TrainContext
from slm_ray.training.inputs import load_inputs
from slm_ray.training.loop import fit
from slm_ray.training.metrics import TrainMetrics, forget_peaks, memory
from slm_ray.training.preflight import resolve

HELD_BYTES = 400_000_000


@pytest.fixture
def measured(tiny_config: TrainConfig) -> TrainMetrics:
    model = dataclasses.replace(tiny_config.model, vocab_size=512)
    return TrainMetrics(dataclasses.replace(tiny_config, model=model), TrainContext(), "fp32")


def test_mfu_is_the_models_operations_over_the_machines(measured: TrainMetrics) -> None:
    assert "mfu" not in measured.figures(1000.0, 1.0)
    sentence = measured.measure_peak()
    assert measured.peak > 0
    assert "large fp32 matrix multiplications measured now on 1 worker(s) at once" in sentence
    half = measured.peak / measured.flops_per_token / 2
    assert measured.figures(half, 1.0)["mfu"] == pytest.approx(0.5)


def test_a_peak_that_was_measured_on_a_busy_machine_is_mended(
    measured: TrainMetrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured.peak = 5e9
    for rate, expected in ((8e9, 8e9), (1e9, 8e9)):
        monkeypatch.setattr(metrics, "peak_flops_per_s", lambda *_, rate=rate, **__: rate)
        measured.measure_peak_again()
        assert measured.peak == expected


def test_the_share_of_reading_batches_is_of_each_interval(
    measured: TrainMetrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 0.25, 1.0, 1.25])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(clock))
    for _ in range(2):
        with measured.timing_data():
            pass
    assert measured.figures(1.0, 2.0)["data_share"] == 0.25
    assert measured.figures(1.0, 2.0)["data_share"] == 0.0


def test_every_line_of_a_run_has_the_figures(tiny_config: TrainConfig) -> None:
    inputs = load_inputs(resolve(dataclasses.replace(tiny_config, sample_prompt=""), lambda _: 1), NullTracker())
    fit(inputs, TrainContext())
    lines = [line for line in inputs.history.lines() if "train_loss" in line]
    assert len(lines) == 4
    for line in lines:
        assert {"mfu", "data_share", "memory_bytes", "peak_memory_bytes"} <= set(line)
        assert 0 < line["data_share"] < 1
        assert line["mfu"] > 0
    assert any("share of peak: " in line.get("message", "") for line in inputs.history.lines())


def test_memory_is_resident_and_at_most_the_peak() -> None:
    figures = memory(torch.device("cpu"))
    assert 10e6 < figures["memory_bytes"] <= figures["peak_memory_bytes"] * 1.05  # the two counters lag a little
    assert set(figures) == {"memory_bytes", "peak_memory_bytes"}


def test_memory_that_cannot_be_read_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(metrics.sys.modules, "psutil", None)
    assert memory(torch.device("cpu")) == {}


@pytest.mark.skipif(sys.platform != "linux", reason="no other system forgets a peak")
def test_what_an_earlier_run_of_the_process_held_is_not_the_peak_of_the_next() -> None:
    with mmap.mmap(-1, HELD_BYTES) as held:  # what is allocated may be kept after its end (`slm_ray.malloc`)
        for page in range(0, HELD_BYTES, mmap.PAGESIZE):
            held[page] = 1
        before = memory(torch.device("cpu"))["peak_memory_bytes"]
        now = memory(torch.device("cpu"))["memory_bytes"]
    assert memory(torch.device("cpu"))["peak_memory_bytes"] >= before
    forget_peaks(torch.device("cpu"))
    assert memory(torch.device("cpu"))["peak_memory_bytes"] < now - HELD_BYTES / 2


@pytest.mark.parametrize("has_begun", [False, True])
def test_a_gpu_that_the_process_has_not_used_yet_has_no_peak_to_forget(
    has_begun: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch then raises "Invalid device argument 0: did you call init?", which would end a sweep's first trials."""
    forgotten: list[torch.device] = []

    def reset(device: torch.device) -> None:
        if not has_begun:
            raise RuntimeError("Invalid device argument 0: did you call init?")
        forgotten.append(device)

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: has_begun)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    forget_peaks(torch.device("cuda", 0))
    assert forgotten == [torch.device("cuda", 0)] * has_begun
