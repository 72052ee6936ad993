"""The loss in chunks against the plain form: value and gradients, in every arithmetic, compiled, tied, under DDP."""

import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from slm_ray.config.schema import ModelConfig
from slm_ray.model import linear_cross_entropy as module
from slm_ray.model.decoder import Decoder
from slm_ray.model.linear_cross_entropy import (
    chunk_rows,
    elements_on_gpu,
    even_rows,
    fused_chunk,
    linear_cross_entropy,
    weighted_cross_entropy,
)
from tests.support.compiler import needs_compiler

ROWS, D_MODEL, VOCAB = 300, 16, 97
HALVES = torch.float32, torch.float16
ALONE = torch.ones(1)
SHARES = torch.tensor([1.0, 0.5, 0.0, 0.25])
"""Of the next token and three further ones, of which one plays no part any more."""


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 rows at a time: four whole chunks and a part."""
    monkeypatch.setattr(module, "MIN_CHUNK_ROWS", 64)
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 0)


def some(dtype: torch.dtype, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, weights and targets, every seventh of them ignored."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, D_MODEL, generator=generator, dtype=dtype) * scale
    weight = torch.randn(VOCAB, D_MODEL, generator=generator, dtype=dtype)
    targets = torch.randint(0, VOCAB, (ROWS,), generator=generator)
    targets[::7] = -1
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def several(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four targets a row, the later ones missing in more rows; in some rows twice the same, in some none."""
    hidden, weight, first = some(dtype)
    targets = torch.stack([first.roll(-distance) for distance in range(4)], dim=1)  # (ROWS, 4)
    targets[5::11, 1] = targets[5::11, 0]
    targets[::13] = -1
    targets[3::17, 1:] = -1
    return hidden, weight, targets, SHARES


def plain_weighted(hidden: Tensor, weight: Tensor, targets: Tensor, shares: Tensor, ignored: int) -> Tensor:
    """By torch's own loss, a target after the other."""
    nats = torch.stack([plain(hidden, weight, one, ignored) for one in targets.unbind(1)])
    return torch.stack((shares.to(nats.dtype) @ nats, nats[0].detach()))


def plain(hidden: Tensor, weight: Tensor, targets: Tensor, ignored: int) -> Tensor:
    logits = F.linear(hidden, weight)
    logits = logits.float() if logits.dtype == torch.bfloat16 else logits
    return F.cross_entropy(logits, targets, ignore_index=ignored, reduction="sum")


def loss_and_gradients(function: object, inputs: tuple[Tensor, Tensor, Tensor], scale: float = 1.0) -> list[Tensor]:
    hidden, weight, targets = inputs
    loss = function(hidden, weight, targets, -1)  # type: ignore[operator]
    return [loss, *torch.autograd.grad(loss * scale, (hidden, weight))]


@pytest.mark.parametrize(
    ("dtype", "rtol", "atol"), [(torch.float64, 1e-12, 1e-12), (torch.float32, 2e-5, 1e-5)], ids=["fp64", "fp32"]
)
def test_loss_and_gradients_are_those_of_the_plain_form(dtype: torch.dtype, rtol: float, atol: float) -> None:
    inputs = some(dtype)
    for ours, theirs in zip(
        loss_and_gradients(linear_cross_entropy, inputs), loss_and_gradients(plain, inputs), strict=True
    ):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)


@pytest.mark.parametrize(
    ("dtype", "rtol", "atol"), [(torch.float64, 1e-12, 1e-12), (torch.float32, 2e-5, 1e-5)], ids=["fp64", "fp32"]
)
def test_several_weighted_targets_give_what_the_plain_form_gives(dtype: torch.dtype, rtol: float, atol: float) -> None:
    hidden, weight, targets, shares = several(dtype)
    found = []
    for function in (weighted_cross_entropy, plain_weighted):
        losses = function(hidden, weight, targets, shares, -1)
        found.append([losses.detach(), *torch.autograd.grad(losses[0] * 3, (hidden, weight))])
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)


def test_one_target_of_full_weight_gives_the_bits_of_the_loss_without_weights() -> None:
    hidden, weight, targets = some(torch.float32)
    both = weighted_cross_entropy(hidden, weight, targets[:, None], ALONE, -1)
    alone = loss_and_gradients(linear_cross_entropy, (hidden, weight, targets))
    assert both.tolist() == [alone[0].item()] * 2
    assert all(map(torch.equal, torch.autograd.grad(both[0], (hidden, weight)), alone[1:]))


def test_the_plain_sum_beside_the_weighted_one_cannot_be_differentiated() -> None:
    hidden, weight, targets, shares = several(torch.float32)
    of_first = weighted_cross_entropy(hidden, weight, targets, shares, -1)[1]
    assert not any(gradient.any() for gradient in torch.autograd.grad(of_first, (hidden, weight)))


def test_a_target_without_weight_may_have_no_finite_loss() -> None:
    weight = torch.tensor([[0.0], [-3e38], [1.0]])
    losses = weighted_cross_entropy(torch.full((1, 1), 9.0), weight, torch.tensor([[2, 1]]), torch.tensor([1.0, 0]), -1)
    assert losses.isfinite().all()


def test_gradients_follow_finite_differences() -> None:
    hidden, weight, targets = some(torch.float64)
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, w, targets[:70], -1), (hidden[:70].detach().requires_grad_(), weight)
    )


def test_under_autocast_it_is_as_near_to_fp32_as_the_plain_form() -> None:
    inputs = some(torch.float32)
    exact = loss_and_gradients(plain, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = loss_and_gradients(linear_cross_entropy, inputs), loss_and_gradients(plain, inputs)
    for mine, other, true in zip(ours, theirs, exact, strict=True):
        assert mine.dtype == torch.float32
        assert (mine - true).norm() <= 1.1 * (other - true).norm() + 1e-3 * true.norm()
        assert (mine - true).norm() <= 0.01 * true.norm()


def test_a_target_whose_softmax_vanishes_has_its_full_loss() -> None:
    weight = torch.tensor([[0.0], [200.0]])
    loss = linear_cross_entropy(torch.ones(1, 1), weight, torch.tensor([0]), -1)
    assert loss.item() == pytest.approx(200.0)


def test_the_factor_behind_the_loss_reaches_the_gradients() -> None:
    inputs = some(torch.float64)
    once, thrice = (
        loss_and_gradients(linear_cross_entropy, inputs),
        loss_and_gradients(linear_cross_entropy, inputs, 3.0),
    )
    torch.testing.assert_close(thrice[1:], [3 * gradient for gradient in once[1:]])


def test_ignored_rows_get_no_gradient_and_give_none() -> None:
    hidden, weight, targets = some(torch.float64)
    _, to_hidden, to_weight = loss_and_gradients(linear_cross_entropy, (hidden, weight, targets))
    kept = targets != -1
    assert not to_hidden[~kept].any()
    fewer = hidden[kept].detach().requires_grad_()
    torch.testing.assert_close(
        loss_and_gradients(linear_cross_entropy, (fewer, weight, targets[kept]))[2], to_weight, rtol=1e-12, atol=1e-12
    )


def test_without_gradients_it_is_the_same_loss_and_makes_none() -> None:
    hidden, weight, targets = some(torch.float32)
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, targets, -1)
    assert not loss.requires_grad
    assert loss.item() == linear_cross_entropy(hidden, weight, targets, -1).item()


def test_in_fp16_a_sum_over_rows_does_not_overflow_and_small_values_keep_their_bits() -> None:
    """64 rows of 1,100 are more than fp16 holds, and no loss scaling reaches into the sum."""
    operator, targets = torch.ops.slm_ray.linear_cross_entropy, torch.zeros(ROWS, 1, dtype=torch.long)
    hidden, weight = torch.full((ROWS, D_MODEL), 1100.0), torch.zeros(VOCAB, D_MODEL)
    hidden[:, 0] = 2e-3
    exact, ours = (operator(hidden, weight, targets, ALONE, -1, dtype, True, False)[2] for dtype in HALVES)
    torch.testing.assert_close(ours, exact, rtol=2e-3, atol=0.0)


def test_in_fp16_many_targets_a_row_do_not_overflow() -> None:
    """32 times 3,000 is more than fp16 holds."""
    hidden, weight = torch.full((ROWS, D_MODEL), 3000.0), torch.zeros(VOCAB, D_MODEL)
    targets, shares = torch.zeros(ROWS, 32, dtype=torch.long), torch.ones(32)
    operator = torch.ops.slm_ray.linear_cross_entropy
    exact, ours = (operator(hidden, weight, targets, shares, -1, dtype, True, False)[2] for dtype in HALVES)
    torch.testing.assert_close(ours, exact, rtol=2e-3, atol=0.0)


def test_a_loss_that_is_no_number_stays_one() -> None:
    hidden, weight, targets = some(torch.float32)
    with torch.no_grad():
        hidden[3] = math.nan
    assert math.isnan(linear_cross_entropy(hidden, weight, targets, -1).item())


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_model_has_the_gradients_of_logits_and_cross_entropy(is_tied: bool) -> None:
    torch.manual_seed(0)
    shape = {"vocab_size": VOCAB, "seq_len": 24, "n_layers": 1, "d_model": 16, "n_heads": 2, "d_ff": 24}
    model = Decoder(ModelConfig(**shape, tie_embeddings=is_tied)).double()
    tokens = torch.randint(0, VOCAB, (8, 25))
    model(tokens[:, :-1], tokens[:, 1:]).backward()
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    logits = model(tokens[:, :-1])
    F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].reshape(-1), reduction="sum").backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-10, atol=1e-10)


def test_ddp_sees_the_gradient_of_a_tied_matrix_once_and_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    torch.manual_seed(0)
    shape = {"vocab_size": VOCAB, "seq_len": 24, "n_layers": 1, "d_model": 16, "n_heads": 2, "d_ff": 24}
    model = Decoder(ModelConfig(**shape))
    tokens = torch.randint(0, VOCAB, (8, 25))
    model(tokens[:, :-1], tokens[:, 1:]).backward()
    alone = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        for _ in range(2):  # a gradient that was not reduced in the first round stops the second
            model.zero_grad()
            wrapped(tokens[:, :-1], tokens[:, 1:]).backward()
    finally:
        torch.distributed.destroy_process_group()
    torch.testing.assert_close([parameter.grad for parameter in model.parameters()], alone)


@pytest.mark.parametrize("is_autocast", [False, True])
def test_compiled_it_is_one_graph_with_the_same_result(is_autocast: bool) -> None:
    inputs = some(torch.float32)
    compiled = torch.compile(linear_cross_entropy, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_autocast):
        for ours, eager in zip(
            loss_and_gradients(compiled, inputs), loss_and_gradients(linear_cross_entropy, inputs), strict=True
        ):
            torch.testing.assert_close(ours, eager)


def test_the_operator_keeps_the_rules_of_torch_for_operators() -> None:
    hidden, weight, targets = some(torch.float32)
    operator = torch.ops.slm_ray.linear_cross_entropy
    for with_gradients in (True, False):
        arguments = (
            hidden.detach(),
            weight.detach(),
            targets[:, None],
            ALONE,
            -1,
            torch.float32,
            with_gradients,
            False,
        )
        found = torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
        assert found == {"test_schema": "SUCCESS", "test_faketensor": "SUCCESS"}


def test_chunks_hold_at_most_two_million_logits_but_128_rows_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert [chunk_rows(10_000, size, torch.device("cpu")) for size in (512, 4096, 50_257)] == [4096, 512, 128]


def test_chunks_on_a_gpu_are_as_large_as_its_memory_allows_and_alike() -> None:
    assert [elements_on_gpu(gib * 2**30) for gib in (8, 24, 80)] == [2**25, 3 * 2**25, 2**28]
    for n_rows, most, expected in [
        (32_768, 65_536, 32_768),
        (32_768, 5_341, 4_096),
        (100, 128, 100),
        (129, 128, 43),
        (97, 24, 20),  # a prime
        (1, 1, 1),
        (0, 128, 1),
    ]:
        assert even_rows(n_rows, most) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_no_bit_depends_on_how_many_rows_go_from_logits_to_slope_at_once(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, weight, targets, shares = several(torch.float32)
    hidden, weight = hidden.detach(), weight.detach()
    operator, found = torch.ops.slm_ray.linear_cross_entropy, []
    for elements in (1, 7 * VOCAB, 2**30):  # a row, seven of a chunk's 64, all of them
        monkeypatch.setattr(module, "BLOCK_ELEMENTS", elements)
        found.append(operator(hidden, weight, targets, shares, -1, dtype, True, False))
    for other in found[1:]:
        assert all(torch.equal(mine, its) for mine, its in zip(found[0], other, strict=True))


def exact_chunk(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """By torch's own loss, in fp64."""
    wide = logits.double().requires_grad_()
    loss = F.cross_entropy(wide, targets, ignore_index=-1, reduction="sum")
    return loss.detach(), torch.autograd.grad(loss, wide)[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("shape", [(1, 2), (1, 50_257), (40, 2), (7, 50_257), (64, 97)], ids=str)
def test_the_form_for_a_compiler_is_exact_at_the_edges(shape: tuple[int, int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    logits = (torch.randn(shape, generator=generator) * 8).to(dtype)
    targets = torch.randint(shape[1], shape[:1], generator=generator)
    targets[-1] = logits[-1].argmax()  # whose probability is near one
    if len(targets) > 1:
        targets[::3] = -1
    wide = torch.promote_types(dtype, torch.float32)
    is_target = (targets != -1)[:, None]
    nats, slope = fused_chunk(logits, targets[:, None].clamp_min(0), is_target.to(wide), wide)
    loss, expected = exact_chunk(logits, targets)
    assert (nats.dtype, slope.dtype) == (wide, dtype)
    torch.testing.assert_close(nats.where(is_target, 0).sum().double(), loss, rtol=1e-6, atol=1e-6)
    rounding = torch.finfo(dtype).eps / 2
    torch.testing.assert_close((slope * is_target).double(), expected, rtol=2 * rounding, atol=1e-6)


def test_the_form_for_a_compiler_has_the_full_loss_of_a_target_whose_softmax_vanishes() -> None:
    logits, index, here = torch.tensor([[0.0, 200.0]]), torch.tensor([[0]]), torch.ones(1, 1)
    nats, slope = fused_chunk(logits, index, here, torch.float32)
    assert (nats.item(), slope.tolist()) == (pytest.approx(200.0), [[-1.0, 1.0]])


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_operator_with_its_compiled_form_gives_what_it_gives_step_by_step(dtype: torch.dtype) -> None:
    """That is how it runs within a compiled model on a GPU; the last chunk has other rows."""
    hidden, weight, targets, shares = several(torch.float32)
    hidden, weight = hidden.detach(), weight.detach()
    operator = torch.ops.slm_ray.linear_cross_entropy
    fused, plainly = (
        operator(hidden, weight, targets, shares, -1, dtype, True, is_fused) for is_fused in (True, False)
    )
    for mine, other in zip(fused, plainly, strict=True):
        assert mine.dtype == other.dtype
        assert (mine - other).norm() <= torch.finfo(dtype).eps * other.norm()
