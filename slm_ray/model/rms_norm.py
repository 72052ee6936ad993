"""RMSNorm that is as fast in eager training on a CPU as compiled.

In: a tensor and its gradient. Out: those of `nn.RMSNorm`, within rounding. torch composes RMSNorm of small operators,
and autograd keeps and goes over each one's result; here the gradient is written out (5 passes). The model uses it.
"""

from typing import Any

import torch
from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich, arXiv:1910.07467)."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., d_model) -> the same shape."""
        is_eager_training = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if is_eager_training and x.device.type == "cpu" and x.dtype == self.weight.dtype:
            return _Normalize.apply(x, self.weight, self.eps)  # type: ignore[no-any-return, no-untyped-call]
        return super().forward(x)


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        square_mean = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.shape[-1]
        inverse = (square_mean + eps).rsqrt()  # (..., 1)
        ctx.save_for_backward(x, weight, inverse)
        y: Tensor = (x * inverse).mul_(weight)
        return y

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, None]:
        """With r = inverse and u = upstream: dx = r w u - x r^3 mean(w u x), dw = sum over the rows of r u x."""
        x, weight, inverse = ctx.saved_tensors
        x, u, r = x.flatten(0, -2), upstream.flatten(0, -2), inverse.flatten()  # (N, d_model), the same, (N,)
        with torch.autocast("cpu", enabled=False):
            product = u * x
            pull = torch.mv(product, weight) * r.pow(3) / x.shape[-1]  # (N,)
            to_weight = torch.mv(product.t(), r)
            to_x = (u * weight).mul_(r[:, None]).addcmul_(x, pull[:, None], value=-1)
        return to_x.view_as(upstream), to_weight, None
