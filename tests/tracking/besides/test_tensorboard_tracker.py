"""TensorBoard's event files, and what is said where the package is missing."""

import importlib.util
from pathlib import Path

import pytest

from slm_ray.config.schema import TrainConfig
from slm_ray.errors import UserError
from slm_ray.tracking.besides.tensorboard_tracker import TensorBoardTracker, require_tensorboard
from slm_ray.tracking.tracker import CompositeTracker, NullTracker
from slm_ray.train import main

needs_tensorboard = pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed"
)


class Kept(NullTracker):
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def log_metrics(self, metrics, step) -> None:  # type: ignore[no-untyped-def]
        self.told.append(f"{dict(metrics)} at {step}")

    def log_text(self, text, name) -> None:  # type: ignore[no-untyped-def]
        self.told.append(name)


def without_tensorboard(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorboard" else find(name))


def test_the_option_without_the_package_is_one_line_and_2_before_anything_starts(
    tiny_config: TrainConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without_tensorboard(monkeypatch)
    with pytest.raises(UserError, match="needs the package tensorboard"):
        require_tensorboard()
    assert main(["--data", tiny_config.data, "--output", tiny_config.output, "--tensorboard"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --tensorboard needs the package tensorboard: `pip install ")
    assert not Path(tiny_config.output).exists()


def test_files_that_cannot_be_written_cost_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    said: list[str] = []
    inner = Kept()
    tracker = CompositeTracker(inner, TensorBoardTracker(tmp_path / "file", said.append))
    tracker.log_metrics({"train_loss": 2.0}, 1)
    tracker.close()
    assert said[0].startswith("TensorBoard does not take the records, the run goes on without: ")
    assert inner.told == ["{'train_loss': 2.0} at 1"]


@needs_tensorboard
def test_metrics_and_samples_are_in_the_files_and_at_the_tracker(tmp_path: Path) -> None:
    inner, said = Kept(), list[str]()
    tracker = CompositeTracker(inner, TensorBoardTracker(tmp_path, said.append))
    tracker.log_metrics({"train_loss": 2.5, "mfu": 0.5}, 10)
    tracker.log_metrics({"train_loss": 2.0}, 20)
    tracker.log_text("Once", "samples/step-00000020.txt")
    tracker.log_text("a: 1", "config.yaml")
    tracker.finish()
    assert said == []
    assert inner.told[2:] == ["samples/step-00000020.txt", "config.yaml"]
    assert len(inner.told) == 4
    seen = read(tmp_path)
    assert [(event.step, event.value) for event in seen.Scalars("train_loss")] == [(10, 2.5), (20, 2.0)]
    (text,) = seen.Tensors("samples/text_summary")
    assert (text.step, text.tensor_proto.string_val[0]) == (20, b"Once")


@needs_tensorboard
def test_a_resumed_run_replaces_the_events_of_the_steps_that_it_does_again(tmp_path: Path) -> None:
    for steps in ((10, 20, 30), (20, 40)):
        tracker = TensorBoardTracker(tmp_path, print)
        for step in steps:
            tracker.log_metrics({"train_loss": float(step)}, step)
        tracker.close()
    assert [event.step for event in read(tmp_path).Scalars("train_loss")] == [10, 20, 40]


def read(folder: Path):  # type: ignore[no-untyped-def]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    seen = EventAccumulator(str(folder))
    seen.Reload()
    return seen
