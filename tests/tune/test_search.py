"""Searches: the same seed and the same results suggest the same, whatever came between."""

import pytest

from slm_ray.errors import UserError
from tune.search import Searcher, Tried
from tune.space import Point, Space, make_space

SPACE = make_space(
    {
        "optim.lr": {"log_range": [1e-4, 1e-2]},
        "optim.beta2": {"range": [0.9, 0.99]},
        "model.n_layers": {"int_range": [2, 6], "step": 2},
        "batch_size": {"log_int_range": [8, 64]},
        "optim.name": ["adamw", "muon"],
    },
    "space",
)


def searcher(kind: str, *, space: Space = SPACE, n_trials: int = 12, seed: int = 0, odd: bool = True) -> Searcher:
    def refusal(point: Point) -> str:
        return "" if odd or point["batch_size"] % 2 == 0 else "an odd batch"

    return Searcher(space=space, kind=kind, n_trials=n_trials, batch=4, seed=seed, refusal=refusal)  # type: ignore[arg-type]


def value(point: Point) -> float:
    return abs(point["optim.beta2"] - 0.97) + point["model.n_layers"] / 100


def results(search: Searcher) -> list[Tried]:
    tried: list[Tried] = []
    while batch := search.next_points(tried):
        tried += [
            Tried(point, None if index == 1 else value(point), rung=index % 2, is_stopped=index == 2)
            for index, point in enumerate(batch)
        ]
    return tried


@pytest.mark.parametrize("kind", ["random", "optuna"])
def test_points_lie_in_the_space_are_new_and_follow_from_the_seed(kind: str) -> None:
    points = [one.point for one in results(searcher(kind))]
    assert len({tuple(point.items()) for point in points}) == len(points) == 12
    for point in points:
        assert list(point) == list(SPACE)
        assert 1e-4 <= point["optim.lr"] <= 1e-2
        assert 0.9 <= point["optim.beta2"] <= 0.99
        assert point["optim.lr"] == float(f"{point['optim.lr']:.4g}")
        assert point["model.n_layers"] in (2, 4, 6)
        assert 8 <= point["batch_size"] <= 64
        assert all(type(number) in (int, float, str) for number in point.values())
    assert [one.point for one in results(searcher(kind))] == points
    assert [one.point for one in results(searcher(kind, seed=1))] != points


def test_optuna_built_anew_from_what_was_tried_goes_on_as_if_it_had_not_stopped() -> None:
    tried = results(searcher("optuna"))
    for n in (4, 8):
        assert searcher("optuna").next_points(tried[:n]) == [one.point for one in tried[n : n + 4]]
    assert searcher("optuna").next_points(tried) == []


def test_more_random_trials_begin_with_the_same() -> None:
    few, more = searcher("random", n_trials=3).next_points([]), searcher("random", n_trials=6).next_points([])
    assert more[:3] == few


def test_what_optuna_suggests_gets_better() -> None:
    tried = results(searcher("optuna", n_trials=40))
    found = [value(one.point) for one in tried]
    assert sum(found[-10:]) < sum(found[:10])


@pytest.mark.parametrize("kind", ["random", "optuna"])
def test_points_that_no_config_accepts_are_drawn_again(kind: str) -> None:
    search = searcher(kind, n_trials=8, odd=False)
    assert all(one.point["batch_size"] % 2 == 0 for one in results(search))


@pytest.mark.parametrize("kind", ["random", "optuna"])
def test_a_small_space_is_tried_as_a_whole_and_then_ends(kind: str) -> None:
    space = make_space({"model.n_layers": {"int_range": [2, 4]}, "optim.beta2": [0.9, 0.95]}, "space")
    search = searcher(kind, space=space, n_trials=6)
    assert len({tuple(one.point.items()) for one in results(search)}) == 6
    with pytest.raises(UserError, match="more than the space has points, 6"):
        searcher(kind, space=space, n_trials=7).check()


def test_a_value_that_goes_with_none_of_the_others_is_refused() -> None:
    space = make_space({"batch_size": [8, 9], "optim.lr": {"range": [0.1, 0.2]}}, "space")
    with pytest.raises(UserError, match="no config accepts batch_size 9: an odd batch"):
        searcher("random", space=space, odd=False).check()
    searcher("random", space=space).check()
    with pytest.raises(UserError, match="no trial with batch_size 9: an odd batch"):
        searcher("grid", space=make_space({"batch_size": [8, 9]}, "s"), n_trials=0, odd=False).check()
