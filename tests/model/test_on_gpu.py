"""The loss on a GPU: value and gradients against fp64, chunk by chunk, and the memory that it takes."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from slm_ray.model import linear_cross_entropy as module
from slm_ray.model.linear_cross_entropy import linear_cross_entropy
from tests.support.gpu import GPU, needs_gpu

pytestmark = needs_gpu


def some(rows: int, vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(size, 64, generator=generator) for size in (rows, vocab_size))
    targets = torch.randint(vocab_size, (rows,), generator=generator)
    if rows > 1:
        targets[::7] = -1
    return hidden.to(GPU).requires_grad_(), (weight / 4).to(GPU).requires_grad_(), targets.to(GPU)


def exact(hidden: Tensor, weight: Tensor, targets: Tensor) -> list[Tensor]:
    both = [values.detach().double().requires_grad_() for values in (hidden, weight)]
    loss = F.cross_entropy(F.linear(*both), targets, ignore_index=-1, reduction="sum")
    return [loss.detach(), *torch.autograd.grad(loss, both)]


@pytest.mark.parametrize("elements", [2**28, 2**20], ids=["one-chunk", "many"])
@pytest.mark.parametrize(("rows", "vocab_size"), [(1, 2), (1, 50_257), (300, 2), (1000, 50_257), (1024, 4096)])
@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("is_bf16", [False, True], ids=["fp32", "bf16"])
def test_it_is_the_plain_form_within_rounding(
    rows: int, vocab_size: int, elements: int, is_compiled: bool, is_bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK_ELEMENTS_ON_GPU", elements)
    inputs = some(rows, vocab_size)
    torch.compiler.reset()  # each shape is compiled anew, and only so many are
    function = torch.compile(linear_cross_entropy, fullgraph=True) if is_compiled else linear_cross_entropy
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=is_bf16):
        loss = function(*inputs, -1)
    found = [loss.detach(), *torch.autograd.grad(loss, inputs[:2])]
    bound = 0.01 if is_bf16 else 1e-4
    for mine, true in zip(found, exact(*inputs), strict=True):
        assert mine.dtype == torch.float32
        assert (mine - true).norm() <= bound * true.norm() + 1e-4


@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
def test_it_holds_a_chunk_of_logits_and_no_more(is_compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_ELEMENTS_ON_GPU", 2**24)
    inputs = some(16_384, 32_768)  # all logits would be 2 GiB in fp32; a chunk is 64 MiB
    function = torch.compile(linear_cross_entropy, fullgraph=True) if is_compiled else linear_cross_entropy
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            torch.autograd.grad(function(*inputs, -1), inputs[:2])
    assert torch.cuda.max_memory_allocated() - before < 512 * 2**20
