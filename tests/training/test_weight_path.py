"""The lookahead and the mean of the last weights: against their definitions, and over a break."""

import pytest
import torch
from torch import Tensor

from slm_ray.config.schema import OptimConfig
from slm_ray.training.besides.weight_path import WeightPath, lookahead, parted, with_path
from slm_ray.training.optim import learning_rate

STEPS = 50


def pulled(weight: Tensor, step: int) -> None:
    """An optimizer of a kind: towards a target, by the step's rate."""
    weight.lerp_(torch.tensor([1.0, -2.0, 3.0]), 0.05 + 0.01 * (step % 3))


def walk(path: WeightPath, weight: Tensor, steps: range) -> list[Tensor]:
    """The weights after each step."""
    found = []
    for step in steps:
        path.before()
        pulled(weight, step)
        path.after(step)
        found.append(weight.clone())
    return found


def test_lookahead_is_the_optimizer_s_step_from_a_point_ahead() -> None:
    """x' = A(x + b m), m' = decay m + (1 - decay) (x' - x): equation of EMA-Nesterov."""
    config = OptimConfig(lookahead=0.6, warmup_steps=0)
    x, mean, expected = torch.zeros(3), torch.zeros(3), []
    for step in range(STEPS):
        y = x + lookahead(step, STEPS, config) * mean
        pulled(y, step)
        mean, x = 0.99 * mean + 0.01 * (y - x), y
        expected.append(x + lookahead(step + 1, STEPS, config) * mean)
    weight = torch.zeros(3)
    found = walk(WeightPath([weight], config, STEPS), weight, range(STEPS))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found[-1], x)  # at its end a run stands on the optimizer's own weights


def test_lookahead_stands_in_the_middle_of_the_run_and_falls_with_the_learning_rate() -> None:
    config = OptimConfig(lookahead=0.5, warmup_steps=0, min_lr=0.0, schedule="linear")
    stands = [lookahead(step, 100, config) for step in range(101)]
    assert [step for step, ahead in enumerate(stands) if ahead] == list(range(16, 76))
    assert stands[40] == pytest.approx(0.5 * learning_rate(40, 100, config) / config.lr)


def test_the_mean_of_the_last_weights_is_blended_in_once() -> None:
    config = OptimConfig(tail_average=0.6)
    plain, weight = torch.zeros(3), torch.zeros(3)
    expected = walk(WeightPath([plain], OptimConfig(), STEPS), plain, range(STEPS))
    found = walk(WeightPath([weight], config, STEPS), weight, range(STEPS))
    assert all(torch.equal(a, b) for a, b in zip(found[:-1], expected[:-1], strict=True))
    mean = expected[42]  # a share of 0.83 of the steps, to the even number
    for one in expected[42:]:
        mean = torch.lerp(mean, one, 1 / (0.055 * STEPS))
    torch.testing.assert_close(found[-1], 0.4 * expected[-1] + 0.6 * mean)


@pytest.mark.parametrize("stop", [5, 20, 39, 46])
def test_over_a_break_it_is_the_same_way_bit_for_bit(stop: int) -> None:
    config = OptimConfig(lookahead=0.6, tail_average=0.6)
    weight = torch.zeros(3)
    whole = walk(WeightPath([weight], config, STEPS), weight, range(STEPS))
    first = torch.zeros(3)
    path = WeightPath([first], config, STEPS)
    walk(path, first, range(stop))
    of_optimizer, state = parted(with_path({"state": 1}, path))
    assert of_optimizer == {"state": 1}
    saved = {name: [one.clone() for one in tensors] for name, tensors in state.items()}
    second = first.clone()
    other = WeightPath([second], config, STEPS)
    other.load_state_dict(saved, stop)
    assert all(torch.equal(a, b) for a, b in zip(walk(other, second, range(stop, STEPS)), whole[stop:], strict=True))


def test_without_either_nothing_is_kept_nor_moved() -> None:
    weight = torch.zeros(3)
    path = WeightPath([weight], OptimConfig(), STEPS)
    path.before()
    path.after(STEPS - 1)
    assert not weight.any()
    assert with_path({"state": 1}, path) == {"state": 1}


def test_a_run_that_is_given_them_later_begins_them_then() -> None:
    weight = torch.ones(3)
    path = WeightPath([weight], OptimConfig(lookahead=0.6, tail_average=0.6), STEPS)
    path.load_state_dict({}, 30)
    walk(path, weight, range(30, STEPS))
    assert set(path.state_dict()) == {"mean_step", "ahead", "unblended"}


def gone_on(state: dict[str, list[Tensor]], weight: Tensor, config: OptimConfig, step: int, steps: int) -> WeightPath:
    path = WeightPath([weight], config, steps)
    path.load_state_dict({name: [one.clone() for one in tensors] for name, tensors in state.items()}, step)
    return path


@pytest.mark.parametrize("stop", [30, 45, STEPS])
def test_an_extended_run_ends_as_one_that_was_as_long_from_its_start(stop: int) -> None:
    config, steps = OptimConfig(tail_average=0.6), 2 * STEPS
    weight = torch.zeros(3)
    whole = walk(WeightPath([weight], config, steps), weight, range(steps))
    weight = torch.zeros(3)
    path = WeightPath([weight], config, STEPS)
    walk(path, weight, range(stop))
    assert not torch.equal(weight, whole[STEPS - 1])
    found = walk(gone_on(path.state_dict(), weight, config, stop, steps), weight, range(stop, steps))
    assert all(torch.equal(a, b) for a, b in zip(found, whole[stop:], strict=True))


def test_a_run_that_is_loaded_at_its_end_has_the_blended_weights_and_can_be_extended_still() -> None:
    config = OptimConfig(tail_average=0.6)
    weight = torch.zeros(3)
    path = WeightPath([weight], config, STEPS)
    walk(path, weight, range(STEPS))
    blended = weight.clone()
    again = gone_on(path.state_dict(), weight, config, STEPS, STEPS)
    assert torch.equal(weight, blended)
    assert torch.equal(again.state_dict()["unblended"][0], path.state_dict()["unblended"][0])


def test_a_mean_of_the_last_weights_that_a_shorter_run_began_is_begun_anew() -> None:
    config = OptimConfig(tail_average=1.0)
    weight = torch.zeros(3)
    path = WeightPath([weight], config, STEPS)
    walk(path, weight, range(46))
    longer = gone_on(path.state_dict(), weight, config, 46, 52)
    assert not longer.state_dict()
    fresh = WeightPath([other := weight.clone()], config, 52)
    assert torch.equal(walk(longer, weight, range(46, 52))[-1], walk(fresh, other, range(46, 52))[-1])


def test_without_lookahead_any_more_the_weights_go_back_to_the_optimizer_s() -> None:
    config = OptimConfig(lookahead=0.6, warmup_steps=0)
    weight = torch.zeros(3)
    path = WeightPath([weight], config, STEPS)
    walk(path, weight, range(20))
    state = path.state_dict()
    own = weight - state["ahead"][0] * state["mean_step"][0]
    assert not torch.equal(weight, own)
    gone_on(state, weight, OptimConfig(), 20, STEPS)
    torch.testing.assert_close(weight, own)


@pytest.mark.parametrize(("field", "value"), [("lookahead", -0.1), ("tail_average", 1.5), ("tail_average", -0.5)])
def test_values_that_make_no_sense_are_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        OptimConfig(**{field: value})
