"""Muon against the definition, and against torch's own."""

import copy
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from slm_ray.training import muon
from slm_ray.training.context import TrainContext
from slm_ray.training.muon import Muon, orthogonalize, row_squares, with_even_rows
from tests.support.compiler import needs_compiler


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 6, 20), (1, 20, 6)])
def test_singular_values_come_near_one_and_directions_stay(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    result = orthogonalize(matrices)
    inner = u.mT @ result @ vh.mT  # (N, r, r): diagonal where the directions are the same
    diagonal = inner.diagonal(dim1=-2, dim2=-1)
    assert result.shape == matrices.shape
    assert torch.allclose(inner, torch.diag_embed(diagonal), atol=1e-9)
    assert 0.79 < diagonal.min() <= diagonal.max() < 1.23


@pytest.mark.parametrize("columns", [500, 900])  # each step on the matrix itself, or through the Gram matrix
def test_all_singular_values_that_matter_come_near_one_in_fp32(columns: int) -> None:
    generator = torch.Generator().manual_seed(4)
    u, v = (torch.linalg.qr(torch.randn(size, 400, generator=generator))[0] for size in (400, columns))
    values = torch.logspace(-2.45, 0, 400)
    values /= values.norm()  # the smallest is 0.0003 of the norm, the largest 0.09
    kept = values >= 0.0031
    result = u.mT @ orthogonalize((u * values @ v.mT)[None])[0] @ v
    assert (result - torch.diag(result.diagonal())).abs().max() < 1e-3
    assert 0.79 < result.diagonal()[kept].min() <= result.diagonal().max() < 1.23
    assert result.diagonal()[~kept].min() > 0


def test_the_way_through_the_gram_matrix_is_the_same() -> None:
    matrices = torch.randn(2, 6, 20, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    matrices /= matrices.norm(dim=(-2, -1), keepdim=True)
    assert torch.allclose(muon._through_gram(matrices), muon._directly(matrices), atol=1e-12)


SHAPES = [
    (256, 256),
    (256, 704),
    (704, 256),
    (512, 2048),
    (1024, 2816),
    (8, 8),
    (4, 64),
    (3, 3),
    (2, 3),
    (1, 1),
    (1, 9),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_singular_value_leaves_the_bound_whatever_the_rank(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Of rank one, the largest is one, where the first polynomial is steepest: a rounding above it exploded."""
    rows, columns = shape
    for seed in range(1 if rows * columns > 100_000 else 8):
        generator = torch.Generator().manual_seed(seed)
        column, row = torch.randn(rows, 2, generator=generator), torch.randn(2, columns, generator=generator)
        noise = torch.randn(shape, generator=generator)
        one = column[:, :1] @ row[:1]
        together = torch.stack([one, one + 1e-3 * noise, column @ row, noise, torch.ones(shape), 1e18 * one])
        made = orthogonalize(together, dtype).double()  # as a step does: rounded once they have their norm
        squares = torch.linalg.eigvalsh(made @ made.mT if rows <= columns else made.mT @ made)  # (6, min(shape))
        assert squares.max().sqrt() < 1.23
        if rows != columns:  # a random square matrix has values near zero
            assert squares[3].min().sqrt() > 0.75


def test_what_comes_in_bfloat16_keeps_the_bound_too() -> None:
    matrices = torch.randn(4, 64, 176, generator=torch.Generator().manual_seed(9)).bfloat16()
    made = orthogonalize(matrices)
    values = torch.linalg.svdvals(made.float())
    assert made.dtype == torch.bfloat16
    assert 0.75 < values.min() <= values.max() < 1.23


def test_a_matrix_of_zeros_stays_so() -> None:
    assert torch.equal(orthogonalize(torch.zeros(1, 4, 4)), torch.zeros(1, 4, 4))


def test_with_its_steps_it_goes_the_way_of_torch_within_its_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(muon, "STEPS", ((3.4445, -4.7750, 2.0315),) * 5)
    shapes = [(16, 16), (24, 16), (16, 16), (16, 24)]
    generator = torch.Generator().manual_seed(1)
    ours = [torch.torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    theirs = [torch.nn.Parameter(matrix.detach().clone()) for matrix in ours]
    starts = [matrix.detach().clone() for matrix in ours]
    optimizers = (
        Muon(ours, lr=1e-2, momentum=0.9, weight_decay=0.2),
        torch.optim.Muon(theirs, lr=1e-2, momentum=0.9, weight_decay=0.2, adjust_lr_fn="match_rms_adamw"),
    )
    for _ in range(10):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator)
            other.grad = mine.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for mine, other, start in zip(ours, theirs, starts, strict=True):
        assert (mine - other).norm() < 0.02 * (other - start).norm()


def test_a_matrix_without_a_gradient_is_left_alone() -> None:
    still, moving = torch.nn.Parameter(torch.ones(4, 4)), torch.nn.Parameter(torch.ones(4, 4))
    moving.grad = torch.eye(4)
    Muon([still, moving], lr=0.1).step()
    assert torch.equal(still, torch.ones(4, 4))
    assert not torch.equal(moving, torch.ones(4, 4))


def test_even_rows_have_one_size_and_the_matrix_keeps_its_norm() -> None:
    updates = torch.tensor([[[3.0, 4.0], [0.3, 0.4]]])
    even = with_even_rows(updates, row_squares(updates), row_squares(updates))
    assert torch.allclose(even.norm(dim=-1), torch.full((1, 2), updates.norm().item() / 2**0.5))
    assert torch.allclose(even.norm(), updates.norm())


def test_rows_are_made_even_as_by_the_definition() -> None:
    """Of NorMuon's definition in fp64: rows of very unlike sizes, one of zeros, and a matrix of zeros."""
    generator = torch.Generator().manual_seed(8)
    updates = torch.randn(3, 5, 7, generator=generator) * torch.logspace(-6, 3, 5)[:, None]
    updates[1, 2], updates[2] = 0.0, 0.0
    squares = torch.rand(3, 5, 1, generator=generator) * torch.logspace(-9, 6, 5)[:, None]
    squares[2] = 0.0
    exact = updates.double() / (squares.double().sqrt() + 1e-10)
    before, after = (values.double().norm(dim=(-2, -1), keepdim=True) for values in (updates, exact))
    expected = exact * before / (after + 1e-10)
    torch.testing.assert_close(row_squares(updates).double(), updates.double().square().mean(-1, keepdim=True))
    got = with_even_rows(updates, squares, row_squares(updates)).double()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)


def test_a_row_that_always_moves_more_is_held_back() -> None:
    generator = torch.Generator().manual_seed(2)
    plain, even = (torch.nn.Parameter(torch.zeros(8, 32)) for _ in range(2))
    optimizers = (Muon([plain], lr=0.1, weight_decay=0.0), Muon([even], lr=0.1, weight_decay=0.0, normalize_rows=True))
    basis = torch.randn(8, 32, generator=generator)
    basis[1:] = 0.1 * basis[1:] + basis[:1]  # nearly one direction: the iteration leaves rows of unlike size
    for _ in range(20):
        gradient = basis + 0.05 * torch.randn(8, 32, generator=generator)
        for parameter, optimizer in zip((plain, even), optimizers, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
    sizes = [parameter.detach().norm(dim=-1) for parameter in (plain, even)]
    assert sizes[1].std() / sizes[1].mean() < 0.5 * sizes[0].std() / sizes[0].mean()


def summing(world_size: int) -> Callable[[Tensor], Tensor]:
    """A sum over threads that each play a rank."""
    barrier, parts = threading.Barrier(world_size, timeout=30), []

    def all_reduce_sum(values: Tensor) -> Tensor:
        parts.append(values)
        barrier.wait()
        total: Tensor = sum(parts, torch.zeros_like(values))
        if barrier.wait() == 0:
            parts.clear()
        barrier.wait()
        return total

    return all_reduce_sum


def trained(starts: list[Tensor], gradients: list[list[Tensor]], **options: bool) -> list[Tensor]:
    """The matrices after a step with each list of gradients."""
    matrices = [torch.nn.Parameter(start.clone()) for start in starts]
    optimizer = Muon(matrices, lr=0.1, normalize_rows=True, **options)
    for of_step in gradients:
        for matrix, gradient in zip(matrices, of_step, strict=True):
            matrix.grad = gradient.clone()
        optimizer.step()
    return [matrix.detach() for matrix in matrices]


def test_in_bfloat16_it_goes_the_same_way_within_that_rounding() -> None:
    shapes = [(64, 64), (64, 64), (176, 64), (64, 176)]
    generator = torch.Generator().manual_seed(6)
    starts = [torch.randn(shape, generator=generator) for shape in shapes]
    gradients = [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(5)]
    exact, rounded = trained(starts, gradients), trained(starts, gradients, in_bf16=True)
    for mine, other, start in zip(rounded, exact, starts, strict=True):
        assert 0 < (mine - other).norm() < 0.01 * (other - start).norm()


@needs_compiler
@pytest.mark.parametrize("in_bf16", [False, True], ids=["fp32", "bf16"])
def test_compiled_it_goes_the_same_way(in_bf16: bool) -> None:
    shapes = [(64, 64), (64, 64), (176, 64), (64, 176)]
    generator = torch.Generator().manual_seed(6)
    starts = [torch.randn(shape, generator=generator) for shape in shapes]
    gradients = [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(3)]
    eager, compiled = (trained(starts, gradients, in_bf16=in_bf16, is_compiled=both) for both in (False, True))
    for mine, other, start in zip(compiled, eager, starts, strict=True):
        assert (mine - other).norm() < (0.01 if in_bf16 else 1e-6) * (other - start).norm()


def test_the_state_of_each_matrix_is_its_own_and_goes_into_another_optimizer() -> None:
    """It is kept for all of a shape together, which nobody outside may notice."""
    generator = torch.Generator().manual_seed(7)
    matrices = [torch.torch.nn.Parameter(torch.randn(4, 6, generator=generator)) for _ in range(3)]
    others = [torch.nn.Parameter(matrix.detach().clone()) for matrix in matrices]
    optimizer, other = (Muon(both, lr=0.1, normalize_rows=True) for both in (matrices, others))
    for active in (matrices, matrices[1:], matrices):  # the first has no gradient in one step
        for matrix in matrices:
            matrix.grad = torch.randn(4, 6, generator=generator) if any(matrix is one for one in active) else None
        optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    for mine, theirs in zip(matrices, others, strict=True):
        theirs.data.copy_(mine.data)
    assert {name: value.shape for name, value in saved["state"][0].items()} == {
        "momentum_buffer": (4, 6),
        "row_squares": (4, 1),
    }
    other.load_state_dict(saved)
    for mine, theirs in zip(matrices, others, strict=True):
        mine.grad = torch.randn(4, 6, generator=generator)
        theirs.grad = mine.grad.clone()
    optimizer.step()
    other.step()
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(matrices, others, strict=True))


@pytest.mark.parametrize("in_bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_work_and_come_to_one_result(
    world_size: int, in_bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = [(8, 8), (12, 8), (8, 8), (8, 8), (8, 12)]  # three of one shape, and one of each of two others
    generator = torch.Generator().manual_seed(3)
    starts = [torch.randn(shape, generator=generator) for shape in shapes]
    gradients = [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(3)]
    counts = dict.fromkeys(range(-1, world_size), 0)

    def train(rank: int, context: TrainContext) -> list[Tensor]:
        matrices = [torch.nn.Parameter(start.clone()) for start in starts]
        optimizer = Muon(matrices, lr=0.1, normalize_rows=True, in_bf16=in_bf16, context=context)
        for of_step in gradients:
            for matrix, gradient in zip(matrices, of_step, strict=True):
                matrix.grad = gradient.clone()
            optimizer.step()
        results[rank] = [matrix.detach() for matrix in matrices]
        return results[rank]

    def counted(matrices: Tensor, dtype: torch.dtype) -> Tensor:
        name = threading.current_thread().name
        counts[int(name) if name.isdigit() else -1] += len(matrices)
        return orthogonalize(matrices, dtype)

    monkeypatch.setattr(muon, "orthogonalize", counted)
    results: dict[int, list[Tensor]] = {}
    alone = train(-1, TrainContext())
    all_reduce_sum = summing(world_size)
    exchanges: list[Tensor] = []
    contexts = [
        TrainContext(
            rank=rank,
            world_size=world_size,
            all_reduce_sum=lambda own: (exchanges.append(own), all_reduce_sum(own))[1],
        )
        for rank in range(world_size)
    ]
    threads = [threading.Thread(target=train, args=pair, name=str(pair[0])) for pair in enumerate(contexts)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert counts.pop(-1) == sum(counts.values()) == len(shapes) * len(gradients)
    assert max(counts.values()) < len(shapes) * len(gradients)
    assert len(exchanges) == world_size * len(gradients), "one a step: each waits for the slowest rank"
    for rank in range(world_size):
        for mine, first, whole in zip(results[rank], results[0], alone, strict=True):
            assert torch.equal(mine, first)
            assert torch.allclose(mine, whole, atol=5e-3 if in_bf16 else 1e-5)


def test_all_that_the_ranks_exchange_goes_at_once_and_keeps_every_bit() -> None:
    """Odd sizes, several types, a rank without a share, and values of which a sum would make others."""
    values = [torch.tensor([[-0.0, 1e-40, 3.0]]), torch.randn(3, 1, 1).bfloat16(), torch.tensor([[[7.0]]]).double()]
    n_exchanges = []
    all_reduce_sum = summing(2)
    found: dict[int, list[Tensor]] = {}

    def counted(own: Tensor) -> Tensor:
        n_exchanges.append(own.dtype)
        return all_reduce_sum(own)

    def exchange(rank: int) -> None:
        context = TrainContext(rank=rank, world_size=2, all_reduce_sum=counted)
        mine = [muon.share_of(len(all_of_it), context) for all_of_it in values]
        shares = [muon.Share(own[part], part, len(own)) for own, part in zip(values, mine, strict=True)]
        found[rank] = muon.exchanged(shares, context)

    threads = [threading.Thread(target=exchange, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert n_exchanges == [torch.uint8] * 2
    for got in found.values():
        for mine, expected in zip(got, values, strict=True):
            assert (mine.dtype, mine.shape) == (expected.dtype, expected.shape)
            assert torch.equal(mine.contiguous().view(torch.uint8), expected.view(torch.uint8))


def test_a_torch_without_steps_of_many_matrices_at_once_makes_the_same_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    def stepped() -> list[Tensor]:
        torch.manual_seed(3)
        matrices = [torch.nn.Parameter(torch.randn(4, 6)) for _ in range(3)]
        optimizer = Muon(matrices, lr=0.1)
        for _ in range(3):
            for matrix in matrices:
                matrix.grad = torch.randn(4, 6)
            optimizer.step()
        return [matrix.detach() for matrix in matrices]

    at_once = stepped()
    monkeypatch.setattr("slm_ray.internals.find", lambda name, default=None: default)
    for before, after in zip(at_once, stepped()):
        torch.testing.assert_close(before, after, rtol=0, atol=1e-7)
