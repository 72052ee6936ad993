"""Muon: momentum whose every update is made orthogonal. For the matrices inside the blocks, not for embeddings.

In: matrices with gradients. Out: their next values. Source: Jordan et al., "Muon: An optimizer for hidden layers in
neural networks" (kellerjordan.github.io/posts/muon); the scale of the update is that of Liu et al., "Muon is Scalable
for LLM Training" (arXiv:2502.16982), section 2.2, so that AdamW's learning rates and weight decay fit.

With `normalize_rows` the rows of the update are brought to one size (Li et al., "NorMuon", arXiv:2510.05491), for
orthogonal updates still have rows, one a neuron, that move much more than others.

`torch.optim.Muon` does the rest one matrix at a time and always in bfloat16, which a CPU without that emulates slowly,
by five equal steps. Here matrices of one shape go through four steps together, each the best one after those before it,
in the precision of the gradients on a CPU unless the run is in bfloat16; and each rank takes its share of them (section
3 of the second paper), for all ranks would compute the same.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from slm_ray import internals

SAFETY = 1.01
"""Factor on the norm, and on what every step but the last is given: the polynomials are steep at one, and what rounding
lifts above it explodes (to 300,000 in bfloat16). So does the algorithm of the paper below."""
POLYNOMIALS = (
    (8.251, -23.6626, 17.3868),
    (4.0193, -2.9543, 0.5564),
    (3.519, -2.6365, 0.5268),
    (2.5061, -1.8478, 0.4383),
)
"""(a, b, c) of each step x -> a x + b x^3 + c x^5.

Each is the polynomial closest to one over what the steps before it leave (Amsel et al., "The Polar Express",
arXiv:2505.16932, section 3, with its cushion of 0.02), found by Remez's method from the lower end 0.003.
"""
STEPS = (*((a / SAFETY, b / SAFETY**3, c / SAFETY**5) for a, b, c in POLYNOMIALS[:-1]), POLYNOMIALS[-1])
"""After them, values of 0.0031 to 1 are between 0.79 and 1.23, in bfloat16 too (there from 0.75 on)."""
GRAM_RATIO = 1.5
"""Matrices longer than this over their width are cheaper through their Gram matrix, however many steps there are."""
RMS_OF_ADAMW = 0.2
"""Root mean square of AdamW's usual update, which the orthogonal one is scaled to."""
ROW_BETA = 0.95
"""Decay of the mean of a row's squares."""
ALIGNMENT = 16
"""Bytes: a multiple of any type's size."""


def orthogonalize(matrices: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Bring every singular value near one (from 0.0031 of the norm on: 0.79 to 1.23), by the odd polynomials of
    `STEPS`.

    matrices: (N, rows, columns). Returns the same shape, multiplied in `dtype` (None: theirs) and of it.
    [[2, 0], [0, 0.1]] -> about [[1, 0], [0, 1]].
    """
    is_tall = matrices.size(-2) > matrices.size(-1)
    x = matrices.mT if is_tall else matrices  # (N, r, c), r <= c: the smaller square is the cheaper one
    wide = torch.promote_types(x.dtype, torch.float32)  # bfloat16's norm may be below the largest singular value
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=wide)  # (N, 1, 1)
    x = (x / (SAFETY * norm + 1e-7)).to(dtype or x.dtype)
    is_long = x.size(-1) > GRAM_RATIO * x.size(-2)
    x = _through_gram(x) if is_long and x.dtype != torch.bfloat16 else _directly(x)
    return x.mT if is_tall else x


def _directly(x: Tensor) -> Tensor:
    """Every step on the matrices themselves. x: (N, r, c)."""
    for a, b, c in STEPS:
        square = x @ x.mT  # (N, r, r)
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x


def _through_gram(x: Tensor) -> Tensor:
    """The same, with all multiplications but the first and the last on the small square. x: (N, r, c).

    Each step multiplies x from the left by a polynomial of x x^T, and all such polynomials commute: so the steps can be
    gathered first. Not for bfloat16, whose rounding of the Gram matrix grows with every step. The idea is that of
    Zhang et al., "Gram Newton-Schulz" (dao-ailab.github.io/blog/2026/gram-newton-schulz).
    """
    gram = x @ x.mT  # (N, r, r), as all below
    gathered = gram
    for number, (a, b, c) in enumerate(STEPS):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        gathered = factor @ gathered if number else factor
        if number < len(STEPS) - 1:
            gram = factor @ gram @ factor
    return gathered @ x


class Ranks(Protocol):
    """What Muon needs to know of the other ranks."""

    @property
    def rank(self) -> int:
        """Number of this one, from 0."""

    @property
    def world_size(self) -> int:
        """How many there are."""

    @property
    def all_reduce_sum(self) -> Callable[[Tensor], Tensor]:
        """Sums a tensor over them."""


def share_of(n_matrices: int, context: Ranks | None) -> slice:
    """Which of the matrices this rank works on."""
    if context is None:
        return slice(0, n_matrices)
    return slice(*(n_matrices * rank // context.world_size for rank in (context.rank, context.rank + 1)))


@dataclasses.dataclass(frozen=True)
class Share:
    """What one rank has made for its share of N matrices."""

    values: Tensor  # (n, ...), those of the matrices `mine`
    mine: slice
    n_matrices: int  # N

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the values of all ranks."""
        return self.n_matrices, *self.values.shape[1:]

    @property
    def n_bytes(self) -> int:
        """Of them in the exchange, and up to the next ones."""
        return -(-math.prod(self.shape) * self.values.element_size() // ALIGNMENT) * ALIGNMENT

    def within(self, their_bytes: Tensor) -> Tensor:
        """The values of all ranks, in the bytes of an exchange."""
        used = math.prod(self.shape) * self.values.element_size()
        return their_bytes[:used].view(self.values.dtype).view(self.shape)


def exchanged(shares: Sequence[Share], context: Ranks | None) -> list[Tensor]:
    """The values of all ranks for each of the shares, (N, ...), the same on every rank, in one exchange.

    Summed are the bytes: where they are another rank's they are zeros, and a CPU adds up bfloat16 slowly.
    """
    if context is None or context.world_size == 1:
        return [share.values for share in shares]
    sizes = [share.n_bytes for share in shares]
    own = torch.zeros(sum(sizes), dtype=torch.uint8, device=shares[0].values.device)
    for share, its_bytes in zip(shares, torch.split(own, sizes), strict=True):
        share.within(its_bytes)[share.mine] = share.values
    everyone_s = torch.split(context.all_reduce_sum(own), sizes)
    return [share.within(its_bytes) for share, its_bytes in zip(shares, everyone_s, strict=True)]


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, with decoupled weight decay. Parameters must be matrices.

    With `context`, the ranks that it names share the work; they must have the same gradients. With `in_bf16` updates
    are multiplied and exchanged in bfloat16 on a CPU too, as they always are on a GPU; the iteration forgives the
    rounding. Momentum and weights keep their precision. With `is_compiled` all between gradients and updates in
    bfloat16 is compiled for each shape. That is for GPUs, where a kernel's start takes longer than most of them run; on
    a CPU it gained 2 ms of 65, and took seconds at the start.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        normalize_rows: bool = False,
        in_bf16: bool = False,
        is_compiled: bool = False,
        context: Ranks | None = None,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "normalize_rows": normalize_rows}
        super().__init__(params, defaults)
        self._in_bf16, self._context = in_bf16, context
        self._made_in_bf16: Callable[..., Tensor] = torch.compile(made, dynamic=False) if is_compiled else made
        self._stacks: dict[tuple[str, Tensor], tuple[Tensor, list[Tensor]]] = {}  # each with its parts
        for group in self.param_groups:
            assert all(parameter.dim() == 2 for parameter in group["params"]), "Muon is for matrices"

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every matrix that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            sets = _by_shape(group["params"])
            shares = [share for matrices in sets for share in self._shares(matrices, group)]
            found = iter(exchanged(shares, self._context) if shares else [])
            for matrices in sets:
                scale = RMS_OF_ADAMW * math.sqrt(max(matrices[0].shape))
                _move(matrices, next(found), 1 - group["lr"] * group["weight_decay"], -group["lr"] * scale)
                if group["normalize_rows"]:
                    squares, _ = self._stacks["row_squares", matrices[0]]
                    _take(squares, next(found))

    def _shares(self, matrices: list[Tensor], group: dict[str, Any]) -> list[Share]:
        """This rank's part of what N matrices of one shape move by, before the scale, and of their rows' squares."""
        gradients = torch.stack([matrix.grad for matrix in matrices if matrix.grad is not None])
        momentum = self._stacked(matrices, "momentum_buffer", gradients)
        squares = self._stacked(matrices, "row_squares", gradients[..., :1]) if group["normalize_rows"] else None
        mine = share_of(len(matrices), self._context)
        dtype = torch.bfloat16 if self._in_bf16 or gradients.is_cuda else gradients.dtype
        make = self._made_in_bf16 if dtype == torch.bfloat16 else made  # inductor does not compile the other way
        updates = make(gradients, momentum, squares, mine.start, mine.stop, group["momentum"], dtype)
        own = [updates] if squares is None else [updates, squares[mine]]
        return [Share(values, mine, len(matrices)) for values in own]

    def _stacked(self, matrices: list[Tensor], name: str, like: Tensor) -> Tensor:
        """One part of the state of all matrices, each of the shape of `like`'s; zeros at first.

        The state of each is a view of it: so a step needs no copies, and what is saved is the same as without.
        """
        whole, parts = self._stacks.get((name, matrices[0]), (None, []))
        states = [self.state[matrix].get(name) for matrix in matrices]
        if whole is None or len(parts) != len(states) or any(a is not b for a, b in zip(parts, states, strict=True)):
            values = [torch.zeros_like(one) if old is None else old for old, one in zip(states, like, strict=True)]
            whole = torch.stack(values)
            parts = list(whole.unbind())
            for matrix, part in zip(matrices, parts, strict=True):
                self.state[matrix][name] = part
            self._stacks[name, matrices[0]] = whole, parts
        return whole


def made(
    gradients: Tensor,
    momentum: Tensor,
    squares: Tensor | None,
    start: int,
    stop: int,
    beta: float,
    dtype: torch.dtype,
) -> Tensor:
    """The updates of the matrices from `start` to `stop`, (stop - start, rows, columns), made and given in `dtype`.

    gradients: (N, rows, columns). momentum: the same, moved on here. squares: (N, rows, 1), moved on for those
    matrices; None where rows stay as they are.
    """
    momentum.lerp_(gradients, 1 - beta)
    updates = gradients[start:stop].lerp(momentum[start:stop], beta)
    if start < stop:
        updates = orthogonalize(updates, dtype).to(updates.dtype)
    if squares is not None:
        of_rows = row_squares(updates)
        updates = with_even_rows(updates, squares[start:stop].lerp_(of_rows, 1 - ROW_BETA), of_rows)
    return updates.to(dtype)


def row_squares(updates: Tensor) -> Tensor:
    """Mean square of every row: (N, rows, 1)."""
    norms: Tensor = torch.linalg.vector_norm(updates, dim=-1, keepdim=True)
    return norms.square() / updates.shape[-1]


def with_even_rows(updates: Tensor, squares: Tensor, of_rows: Tensor) -> Tensor:
    """Divide each row by the root of its mean square over time; each matrix keeps its norm.

    updates: (N, rows, columns). squares: (N, rows, 1), over time; of_rows: the same of these updates alone, from which
    both norms follow. The norm is kept, so the mean over time needs no correction at the start.
    """
    factor = 1 / (squares.sqrt() + 1e-10)  # (N, rows, 1)
    norm, even = (each.sum(dim=-2, keepdim=True).sqrt() for each in (of_rows, of_rows * factor.square()))  # (N, 1, 1)
    return updates * (factor * (norm / (even + 1e-10)))


def _take(whole: Tensor, values: Tensor) -> None:
    if whole.data_ptr() != values.data_ptr():  # a rank alone has them there already
        whole.copy_(values)


def _move(matrices: list[Tensor], updates: Tensor, kept: float, by: float) -> None:
    """Each matrix becomes `kept` of itself and `by` of its update, (N, rows, columns): at once where torch can."""
    parts = updates.to(matrices[0].dtype).unbind()
    multiply, add = internals.find("torch:_foreach_mul_"), internals.find("torch:_foreach_add_")
    if multiply is not None and add is not None:
        multiply(matrices, kept)
        add(matrices, parts, alpha=by)
        return
    for matrix, part in zip(matrices, parts, strict=True):
        matrix.mul_(kept).add_(part, alpha=by)


def _by_shape(parameters: list[Tensor]) -> list[list[Tensor]]:
    shapes: dict[torch.Size, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            shapes.setdefault(parameter.shape, []).append(parameter)
    return list(shapes.values())
