"""The weights by which the branches of DS-GIM damp dissimilar windows (section 5.2; section 9, row 1)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..validation import check_decay_weights


@torch.no_grad()
def similar_tokens(score: Tensor, grid: tuple[int, int], window: int) -> Tensor:
    """Mark the tokens of the half of the windows with the largest scores; ties go to the lower index.

    Args:
        score: ``[B, n_windows]``, windows in row-major order.
        grid: height and width in tokens.
        window: side of a window in tokens.

    Returns:
        ``[B, H * W]`` bool.
    """
    height, width = grid
    order = score.argsort(dim=1, descending=True, stable=True)
    chosen = order[:, : score.shape[1] // 2]
    similar = torch.zeros_like(score, dtype=torch.bool).scatter(1, chosen, True)
    similar = similar.view(-1, height // window, 1, width // window, 1)
    return similar.expand(-1, -1, window, -1, window).reshape(-1, height * width)


@torch.no_grad()
def decay_weights(
    score: Tensor, grid: tuple[int, int], window: int, gamma: float, variant: str, dtype: torch.dtype
) -> Tensor:
    """The weight of every token in the query, the key and the value projection; the value's is 1.

    The similar windows are the half with the largest scores, ties to the lower index. ``"paper"`` weighs the query by
    `gamma` on their tokens and by 1 elsewhere, and the key the other way round. ``"released"`` keeps the dissimilar
    tokens in the query and the similar ones in the key, and none of either in the first image.

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
    similar = similar_tokens(score, grid, window)
    ones = torch.ones_like(similar, dtype=dtype)
    if variant == "paper":
        return torch.stack([ones.masked_fill(similar, gamma), ones.masked_fill(~similar, gamma), ones], -1)
    first = torch.arange(similar.shape[0], device=similar.device).unsqueeze(1) == 0
    return torch.stack([ones.masked_fill(similar | first, 0), ones.masked_fill(~similar | first, 0), ones], -1)
