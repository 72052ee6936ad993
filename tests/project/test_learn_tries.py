"""What the bench of learning tries: within its size, in shapes that others open, and put together by its rule."""

import dataclasses

import pytest

from slm_ray.config.schema import ModelConfig
from slm_ray.model.decoder import parameter_count
from slm_ray.model.hf_layout import family
from tests.support.benches import learning_bench

learning_bench("learn_try")  # which the next two import
learning_bench("learn_demos")
TRIES = learning_bench("learn_tries")


def test_every_try_is_small_enough_and_opens_as_a_llama_or_qwen3() -> None:
    for name in TRIES.TRIES:
        one = TRIES.resolved(name)
        vocabulary = int(one.data.rpartition("-")[2] or 4096)
        shape = ModelConfig(**dict(one.changes["model"]) | {"vocab_size": vocabulary})
        assert parameter_count(shape) <= TRIES.MAX_PARAMETERS, name
        assert family(shape) in ("llama", "qwen3"), name
        config = TRIES.config_of(one, name, data="data/real", seed=3)
        assert (config.seed, config.epochs) == (3, one.share), name


def test_what_won_is_the_best_of_each_axis_by_more_than_chance() -> None:
    figures = {
        "base": 0.75,
        "batch 8": 0.74,
        "batch 8, lr 2e-3": 0.745,
        "qk-norm": 0.7496,
        "adamw": 0.7,
        "lr 2e-3": 0.748,
    }
    assert TRIES.winners(figures) == ["batch 8", "lr 2e-3"]


def test_tries_together_have_all_their_changes() -> None:
    both = TRIES.together(["batch 8", "context from 64", "vocabulary 2,048"])
    tries = TRIES.TRIES | {"both": both}
    found = TRIES.resolved("both", tries)
    assert found.changes["batch_size"] == 8
    assert found.changes["model"]["d_ff"] == 832
    assert found.extras == {"grow": ((0.4, 64),)}
    assert TRIES.config_of(found, "both", data="data/real", seed=0).data == "data/real-2048"


def test_a_share_of_a_share_is_their_product() -> None:
    tries = TRIES.TRIES | {"less": dataclasses.replace(TRIES.Try(), share=0.5, parent="0.7 of an epoch")}
    assert TRIES.resolved("less", tries).share == pytest.approx(0.35)
