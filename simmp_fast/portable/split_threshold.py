"""The Euclidean split of DS-GIM (section 5.4)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..validation import check_split_threshold
from .precision import at_least_float32, no_autocast


@torch.no_grad()
def split_threshold(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """The mean score of each row, and the distance from which another row counts as far.

    ``r_i = mean_j query_i . key_j``; ``t_i`` is the ``max(1, N // 2)``-th largest of ``|r_i - r_j|`` over all j.

    ``r_i = query_i . mean_j key_j`` needs no score matrix. In rank order of r the rows nearer than the rank-th farthest
    are a window of ``N - rank + 1`` neighbours, and ``t_i`` is the least, over the windows, of the distance to the
    farther end: the distance to the left end falls as the window moves right, the other rises, so a binary search
    finds where they cross. Rounding of a difference keeps its order, so ``t_i`` is exact.

    Args:
        query, key: ``[B, N, C]``, one floating dtype, N >= 1.

    Returns:
        row_mean ``[B, N]`` and threshold ``[B, N]``: float64 for float64 input, float32 otherwise, also under autocast.
        Carries no gradient.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or device.
    """
    check_split_threshold(query, key)
    with no_autocast(query):
        centre = at_least_float32(key).mean(1, keepdim=True)
        row_mean = (at_least_float32(query) * centre).sum(-1)
    rows = row_mean.shape[1]
    rank = max(1, rows // 2)
    ordered = row_mean.sort(-1).values
    left_ends, right_ends = ordered[:, :rank], ordered[:, rows - rank :]

    # The first window whose left end is no farther than its right end; `rank` where there is none.
    crossing = torch.zeros_like(row_mean, dtype=torch.int64)
    step = 1 << (rank.bit_length() - 1)
    while step:
        before = (crossing + (step - 1)).clamp_max(rank - 1)
        left, right = row_mean - left_ends.gather(1, before), right_ends.gather(1, before) - row_mean
        crossing = torch.where((crossing + step <= rank) & (left > right), crossing + step, crossing)
        step >>= 1
    to_right = right_ends.gather(1, crossing.clamp_max(rank - 1)) - row_mean
    to_left = row_mean - left_ends.gather(1, (crossing - 1).clamp_min(0))
    nearest = torch.where(crossing < rank, to_right, torch.inf)
    return row_mean, torch.minimum(nearest, torch.where(crossing > 0, to_left, torch.inf))
