"""Pictures of a sweep, whatever was varied."""

from pathlib import Path
from typing import Any

import pytest

from tune.results import Trial, TrialStatus
from tune.shown.plots import draw_curves, draw_heat_map, draw_parallel, fields_that_vary_most

PNG = b"\x89PNG"


def trials(points: list[dict[str, Any]]) -> list[Trial]:
    return [
        Trial(
            point=point,
            metrics={"val_loss": 2.0, "val_bits_per_byte": 1.0 + index / 10, "step": 4.0},
            status=TrialStatus.STOPPED if index % 2 else TrialStatus.FINISHED,
            step=4,
        )
        for index, point in enumerate(points)
    ]


@pytest.mark.parametrize(
    "points",
    [
        [{"optim.lr": lr, "model.d_ff": d_ff} for lr in (1e-4, 1e-2) for d_ff in (32, 64)],
        [{"optim.lr": 10.0**-k, "optim.beta1": k / 10, "optim.name": "muon"} for k in range(1, 9)],  # far apart
        [{"optim.lr": 0.1}, {"optim.lr": 0.2}],
        [{"optim.name": "muon", "optim.min_lr": None}, {"optim.name": "adamw", "optim.min_lr": 0.0}],
        [{"optim.normalize_rows": True}],
    ],
)
def test_pictures_are_drawn_of_any_fields(points: list[dict[str, Any]], tmp_path: Path) -> None:
    found = trials(points)
    draw_heat_map(found, fields_that_vary_most(found), tmp_path / "map.png")
    draw_parallel(found, tmp_path / "parallel.png")
    draw_curves({trial.name: ([2, 4], [2.0, 1.0]) for trial in found}, tmp_path / "curves.png")
    for name in ("map.png", "parallel.png", "curves.png"):
        assert (tmp_path / name).read_bytes().startswith(PNG)


def test_the_two_fields_with_the_most_values_are_chosen_in_the_order_of_the_space() -> None:
    points = [{"a.x": i, "a.y": i % 2, "a.z": i % 3} for i in range(6)]
    assert fields_that_vary_most(trials(points)) == ["a.x", "a.z"]
