"""Muon against the definition, and against torch's own."""

import pytest
import torch

from slm_ray.muon import Muon, orthogonalize


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 6, 20), (1, 20, 6)])
def test_singular_values_come_near_one_and_directions_stay(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    result = orthogonalize(matrices)
    inner = u.mT @ result @ vh.mT  # (N, r, r): diagonal where the directions are the same
    diagonal = inner.diagonal(dim1=-2, dim2=-1)
    assert result.shape == matrices.shape
    assert torch.allclose(inner, torch.diag_embed(diagonal), atol=1e-9)
    assert 0.3 < diagonal.min() <= diagonal.max() < 1.3


def test_a_matrix_of_zeros_stays_so() -> None:
    assert torch.equal(orthogonalize(torch.zeros(1, 4, 4)), torch.zeros(1, 4, 4))


def test_it_goes_the_way_of_torch_within_its_bfloat16() -> None:
    shapes = [(16, 16), (24, 16), (16, 16), (16, 24)]
    generator = torch.Generator().manual_seed(1)
    ours = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
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
