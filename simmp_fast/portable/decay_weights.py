"""The weights by which the branches of DS-GIM damp windows (section 5.2; section 9, row 1)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..validation import check_decay_weights


@torch.no_grad()
def decay_weights(
    score: Tensor, grid: tuple[int, int], window: int, gamma: float, variant: str, dtype: torch.dtype
) -> Tensor:
    """The weight of every token in the query, the key and the value projection; the value's is 1.

    A window is similar if fewer than half of the windows come before it (a larger score, or an equal one with a lower
    index): a rank by counting, without a sort and a scatter.

    Args:
        score: ``[B, n_windows]``, floating, from `window_similarity`.
        grid: height and width in tokens.
        window: side of a window in tokens, a divisor of both.
        gamma: the decay.
        variant: ``"paper"`` or ``"released"``.
        dtype: dtype of the weights, floating.

    Returns:
        ``[B, H * W, 3]``: query, key, value. Carries no gradient.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or choice.
    """
    check_decay_weights(score, grid, window, variant)
    count, rows, columns = score.shape[1], grid[0] // window, grid[1] // window
    index = torch.arange(count, device=score.device)
    other, own = score.unsqueeze(1), score.unsqueeze(2)
    before = (other > own) | ((other == own) & (index < index.unsqueeze(1)))
    similar = (before.sum(2) < count // 2).view(-1, rows, 1, columns, 1)
    similar = similar.expand(-1, -1, window, -1, window).reshape(-1, grid[0] * grid[1])
    if variant == "paper":
        query, key, low = similar, ~similar, gamma
    else:
        first = torch.arange(score.shape[0], device=score.device).unsqueeze(1) == 0
        query, key, low = similar | first, ~similar | first, 0.0
    damped = torch.stack([query, key, torch.zeros_like(similar)], -1)
    return torch.ones_like(damped, dtype=dtype).masked_fill(damped, low)
