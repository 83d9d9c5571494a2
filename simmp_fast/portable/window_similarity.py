"""Cosine similarity inside the windows of a feature map (section 5.1)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..validation import check_window_similarity
from .assign_clusters import NORM_FLOOR
from .precision import at_least_float32


@torch.no_grad()
def window_similarity(x: Tensor, window: int) -> Tensor:
    """In each window, the sum over ``i <= j`` of ``cos(x_i, x_j)`` over its tokens, each norm clamped at 1e-8.

    With ``u_i = x_i / max(|x_i|, 1e-8)`` the sum is ``(|sum_i u_i|^2 + sum_i |u_i|^2) / 2``: linear in the tokens of a
    window, no matrix of pairs.

    Args:
        x: ``[B, C, H, W]``, floating.
        window: side of a window in tokens, a divisor of H and of W.

    Returns:
        score ``[B, n_windows]``, windows in row-major order, float32 or better. Carries no gradient.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype or shape, or a window that does not divide the grid.
    """
    check_window_similarity(x, window)
    batch, channels, height, width = x.shape
    rows, columns = height // window, width // window
    x = at_least_float32(x)
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    scale = norm.clamp_min(NORM_FLOOR).reciprocal()
    total = (x * scale).reshape(batch, channels, rows, window, columns, window).sum((3, 5))
    own = (norm * scale).square().reshape(batch, rows, window, columns, window).sum((2, 4))
    return (total.square().sum(1) + own).div(2).reshape(batch, rows * columns)
