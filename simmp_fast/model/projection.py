"""Several projections of the same tokens as one matrix product (performance identity 4)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..validation import product_dtype


class _JointProduct(torch.autograd.Function):
    """One product by trained and frozen weights together; backward is the product of the trained ones alone.

    Autograd would carry zeros for the frozen part through both products of its backward.
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, trained: Tensor, frozen: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(tokens, trained)
        joint = F.linear(tokens, torch.cat([trained, frozen]))
        live, idle = joint.split([trained.shape[0], frozen.shape[0]], -1)
        ctx.mark_non_differentiable(idle)
        return live, idle

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None]:
        tokens, trained = ctx.saved_tensors
        return grad @ trained, grad.flatten(0, -2).T @ tokens.flatten(0, -2), None


def project(tokens: Tensor, trained: list[Tensor], frozen: Tensor | None) -> tuple[list[Tensor], Tensor | None]:
    """Project tokens by several weights in one product.

    Args:
        tokens: ``[B, N, C]``.
        trained: weights ``[D_i, C]`` that gradients reach.
        frozen: a weight ``[D', C]`` that none reaches, or None.

    Returns:
        the projections ``[B, N, D_i]``, slices of one tensor, and the frozen one ``[B, N, D']`` or None; in the dtype
        of autocast where it is on.
    """
    sizes = [weight.shape[0] for weight in trained]
    dtype = product_dtype(tokens)
    tokens, weights = tokens.to(dtype), torch.cat(trained).to(dtype)
    if frozen is None:
        return list(F.linear(tokens, weights).split(sizes, -1)), None
    live, idle = _JointProduct.apply(tokens, weights, frozen.to(dtype))
    return list(live.split(sizes, -1)), idle
