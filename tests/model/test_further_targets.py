"""Targets beyond the next token: which they are, and the two losses that the model makes of them."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from slm_ray.config.schema import IGNORED_TARGET, ModelConfig
from slm_ray.model.decoder import Decoder
from slm_ray.model.further_targets import further_targets

GONE = IGNORED_TARGET
SHAPE = ModelConfig(vocab_size=40, seq_len=8, n_layers=1, d_model=16, n_heads=2, d_ff=24, init_std=0.3)


def test_each_place_has_the_tokens_after_its_next_one_up_to_the_end_of_the_row() -> None:
    found = further_targets(torch.tensor([[5, 6, 7], [8, GONE, 9]]), 2)
    assert found.tolist() == [
        [[5, 6, 7], [6, 7, GONE], [7, GONE, GONE]],
        [[8, GONE, 9], [GONE, 9, GONE], [9, GONE, GONE]],
    ]


def test_another_text_is_not_asked_for() -> None:
    """Two texts in a row: 5 6 7 end, and 8 9 end."""
    targets, places = torch.tensor([[6, 7, 0, 9, 0]]), torch.tensor([[0, 1, 2, 0, 1]])
    found = further_targets(targets, 2, places)
    assert found[0].tolist() == [[6, 7, 0], [7, 0, GONE], [0, GONE, GONE], [9, 0, GONE], [0, GONE, GONE]]


@pytest.mark.parametrize("further", [0, 1, 3, 5])
def test_any_number_of_further_tokens_fits_any_row(further: int) -> None:
    targets = torch.tensor([[5, 6, 7]])
    found = further_targets(targets, further, torch.tensor([[0, 1, 2]]))
    expected = [[5, 6, 7, GONE, GONE, GONE, GONE, GONE][at : at + further + 1] for at in range(3)]
    assert found[0].tolist() == expected


def batch() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(40, (3, 9), generator=torch.Generator().manual_seed(0))
    targets = tokens[:, 1:].clone()
    targets[0, :3] = IGNORED_TARGET
    return tokens[:, :-1], targets


def test_the_model_gives_the_sum_with_further_tokens_and_the_plain_one() -> None:
    torch.manual_seed(0)
    model, (x, y) = Decoder(SHAPE), batch()
    shares = torch.tensor([0.5, 0.25])
    found = model(x, y, None, shares)
    logits = model(x)
    nats = [
        F.cross_entropy(logits[:, : 8 - k].flatten(0, 1), y[:, k:].flatten(), ignore_index=GONE, reduction="sum")
        for k in range(3)
    ]
    torch.testing.assert_close(found[0], nats[0] + 0.5 * nats[1] + 0.25 * nats[2])
    assert found[1].item() == model(x, y).item()


def test_weights_of_zero_leave_loss_and_gradients_as_they_are() -> None:
    torch.manual_seed(0)
    model, (x, y) = Decoder(SHAPE), batch()
    losses = model(x, y, None, torch.zeros(2))
    torch.testing.assert_close(losses, model(x, y).expand(2))  # the sums' order differs
    weights = list(model.parameters())
    assert all(map(torch.equal, torch.autograd.grad(losses[0], weights), torch.autograd.grad(model(x, y), weights)))
