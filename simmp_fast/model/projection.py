"""Several projections of the same tokens as one matrix product (performance identity 4)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def project(tokens: Tensor, weights: list[Tensor]) -> list[Tensor]:
    """Project tokens by several weights in one product.

    Args:
        tokens: ``[B, N, C]``, in the dtype of the product.
        weights: ``[D_i, C]`` each.

    Returns:
        the projections ``[B, N, D_i]``, slices of one tensor, in the dtype of `tokens`.
    """
    sizes = [weight.shape[0] for weight in weights]
    return list(F.linear(tokens, torch.cat(weights).to(tokens.dtype)).split(sizes, -1))
