"""The schedule, the parameter groups, and what is restored."""

import dataclasses

import pytest
import torch

from slm_ray.config.schema import ModelConfig, OptimConfig
from slm_ray.errors import UserError
from slm_ray.model.decoder import Decoder
from slm_ray.training.muon import Muon
from slm_ray.training.optim import (
    AnyOptimizer,
    CombinedOptimizer,
    learning_rate,
    make_optimizer,
    parameter_groups,
    restore_optimizer,
    set_learning_rate,
)

CONFIG_OF_MUON = OptimConfig(name="muon", lr=1e-2)
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


def test_the_linear_way_is_straight_and_the_constant_one_falls_at_the_end() -> None:
    linear = OptimConfig(lr=1e-3, min_lr=0.0, warmup_steps=0, schedule="linear")
    assert [learning_rate(step, 5, linear) for step in range(5)] == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4, 0.0])
    constant = dataclasses.replace(linear, schedule="constant", decay_share=0.5)
    assert [learning_rate(step, 5, constant) for step in range(5)] == pytest.approx([1e-3, 1e-3, 1e-3, 5e-4, 0.0])


@pytest.mark.parametrize(
    ("field", "value"), [("decay_share", 0.0), ("embed_lr_factor", 0.0), ("momentum", 1.0), ("min_lr", 1.0)]
)
def test_values_that_make_no_sense_are_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        OptimConfig(**{field: value})


def model() -> Decoder:
    torch.manual_seed(0)
    return Decoder(ModelConfig(vocab_size=64, n_layers=2, d_model=32, n_heads=2, d_ff=48, bias=True, norm="layer"))


def train(of: Decoder, optimizer: AnyOptimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        tokens = torch.randint(64, (4, 9), generator=torch.Generator().manual_seed(step))
        loss = of(tokens[:, :-1], tokens[:, 1:]) / 32
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_only_matrices_decay_and_only_embeddings_have_a_rate_of_their_own() -> None:
    config = OptimConfig(embed_lr_factor=2.0)
    groups = parameter_groups(model(), config)
    assert {kind: (group["weight_decay"], group["lr_factor"]) for kind, group in groups.items()} == {
        "matrices": (0.1, 1.0),
        "embeddings": (0.1, 2.0),
        "vectors": (0.0, 1.0),
    }
    assert all(parameter.dim() == 1 for parameter in groups["vectors"]["params"])
    assert [tuple(parameter.shape) for parameter in groups["embeddings"]["params"]] == [(64, 32)]
    assert sum(len(group["params"]) for group in groups.values()) == len(list(model().parameters()))


def test_norms_of_queries_and_keys_are_vectors_which_muon_leaves_alone() -> None:
    config = ModelConfig(vocab_size=64, n_layers=2, d_model=32, n_heads=2, d_ff=48, qk_norm=True)
    normed = Decoder(config)
    vectors = {id(parameter) for parameter in parameter_groups(normed, CONFIG_OF_MUON)["vectors"]["params"]}
    norms = [
        parameter for name, parameter in normed.named_parameters() if name.endswith(("q_norm.weight", "k_norm.weight"))
    ]
    assert len(norms) == 4 and {id(norm) for norm in norms} <= vectors
    before = [norm.detach().clone() for norm in norms]
    train(normed, make_optimizer(normed, CONFIG_OF_MUON), range(2))
    assert all(not torch.equal(*pair) for pair in zip(before, norms, strict=True))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_each_group_gets_its_rate(name: str) -> None:
    optimizer = make_optimizer(model(), OptimConfig(name=name, embed_lr_factor=2.0))  # type: ignore[arg-type]
    set_learning_rate(optimizer, 0.5)
    assert sorted(group["lr"] for group in optimizer.param_groups) == [0.5, 0.5, 1.0]


def test_muon_takes_the_matrices_of_the_blocks_and_nothing_else() -> None:
    optimizer = make_optimizer(model(), OptimConfig(name="muon"))
    assert isinstance(optimizer, CombinedOptimizer)
    muon, adamw = optimizer.parts
    assert isinstance(muon, Muon)
    n_matrices = 2 * (4 + 3)
    assert sum(len(group["params"]) for group in muon.param_groups) == n_matrices
    assert sum(len(group["params"]) for group in adamw.param_groups) == len(list(model().parameters())) - n_matrices


@pytest.mark.parametrize("in_bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "config",
    [
        OptimConfig(name="adamw", lr=1e-2),
        OptimConfig(name="muon", lr=1e-2),
        OptimConfig(name="muon", lr=1e-2, normalize_rows=True),
    ],
    ids=["adamw", "muon", "normuon"],
)
def test_restored_it_goes_on_bit_for_bit(config: OptimConfig, in_bf16: bool) -> None:
    whole, first = model(), model()
    losses = train(whole, make_optimizer(whole, config, in_bf16=in_bf16), range(6))
    optimizer = make_optimizer(first, config, in_bf16=in_bf16)
    train(first, optimizer, range(3))
    second = model()
    second.load_state_dict(first.state_dict())
    other = make_optimizer(second, config, in_bf16=in_bf16)
    restore_optimizer(other, optimizer.state_dict())
    assert train(second, other, range(3, 6)) == losses[3:]
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True))


def test_what_the_config_says_wins_over_the_checkpoint() -> None:
    saved = make_optimizer(model(), OptimConfig(name="muon", momentum=0.9, weight_decay=0.5)).state_dict()
    optimizer = make_optimizer(model(), OptimConfig(name="muon", momentum=0.8, weight_decay=0.2, embed_lr_factor=3.0))
    restore_optimizer(optimizer, saved)
    groups = optimizer.param_groups
    assert [group.get("momentum") for group in groups] == [0.8, None, None]
    assert [group["weight_decay"] for group in groups] == [0.2, 0.2, 0.0]
    assert [group["lr_factor"] for group in groups] == [1.0, 3.0, 1.0]


@pytest.mark.parametrize(("was", "now"), [("adamw", "muon"), ("muon", "adamw")])
def test_the_state_of_another_optimizer_is_refused(was: str, now: str) -> None:
    saved = make_optimizer(model(), OptimConfig(name=was)).state_dict()  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"another optim\.name"):
        restore_optimizer(make_optimizer(model(), OptimConfig(name=now)), saved)  # type: ignore[arg-type]
