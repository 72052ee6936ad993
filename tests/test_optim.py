"""The schedule and the parameter groups."""

import pytest

from slm_ray.config import ModelConfig, OptimConfig
from slm_ray.model import Decoder
from slm_ray.optim import learning_rate, make_optimizer, parameter_groups

CONFIG = OptimConfig(lr=1e-3, min_lr=1e-4, warmup_steps=10)


def test_warmup_rises_to_the_rate_and_the_cosine_ends_at_the_final_rate() -> None:
    rates = [learning_rate(step, 100, CONFIG) for step in range(100)]
    assert rates[0] == pytest.approx(1e-4)
    assert rates[9] == pytest.approx(1e-3)
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(1e-4)


def test_halfway_the_cosine_is_halfway() -> None:
    config = OptimConfig(lr=1e-3, min_lr=0.0, warmup_steps=0)
    assert learning_rate(50, 101, config) == pytest.approx(5e-4)


def test_a_short_run_has_a_short_warmup() -> None:
    assert learning_rate(2, 20, OptimConfig(lr=1.0, warmup_steps=50)) == pytest.approx(1.0)


@pytest.mark.parametrize("max_steps", [1, 2, 5])
def test_the_shortest_runs_have_a_rate(max_steps: int) -> None:
    assert all(learning_rate(step, max_steps, CONFIG) > 0 for step in range(max_steps))


def test_only_matrices_decay() -> None:
    model = Decoder(ModelConfig(vocab_size=64, n_layers=1, d_model=32, n_heads=2, d_ff=32, bias=True, norm="layer"))
    decayed, plain = parameter_groups(model, 0.1)
    assert all(parameter.dim() >= 2 for parameter in decayed["params"])
    assert all(parameter.dim() == 1 for parameter in plain["params"])
    assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters()))
    assert [group["weight_decay"] for group in make_optimizer(model, CONFIG).param_groups] == [0.1, 0.0]
