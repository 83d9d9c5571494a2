"""Cosine similarity inside the windows of a feature map (section 5.1)."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from ..validation import check_window_similarity
from .assign_clusters import NORM_FLOOR
from .precision import at_least_float32, no_autocast


@torch.no_grad()
def window_similarity(x: Tensor, window: int) -> Tensor:
    """In each window, the sum over ``i <= j`` of ``cos(x_i, x_j)`` over its tokens, each norm clamped at 1e-8.

    Args:
        x: ``[B, C, H, W]``, floating.
        window: side of a window in tokens, a divisor of H and of W.

    Returns:
        score ``[B, n_windows]``, windows in row-major order, float32 or better. Carries no gradient.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype or shape, or a window that does not divide the grid.
    """
    check_window_similarity(x, window)
    with no_autocast(x):
        tokens = rearrange(at_least_float32(x), "b c (i u) (j v) -> b (i j) (u v) c", u=window, v=window)
        unit = tokens / tokens.norm(dim=-1, keepdim=True).clamp_min(NORM_FLOOR)
        cosine = torch.einsum("bwic,bwjc->bwij", unit, unit)
        return cosine.triu().sum((-2, -1))
