"""The Euclidean split of DS-GIM and the two softmaxes over its sets (sections 5.4 and 5.5)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..validation import check_split_attention, check_split_threshold
from .precision import at_least_float32, no_autocast, softmax_rows

FILL = -100.0


@torch.no_grad()
def split_threshold(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """The mean score of each row, and the distance from which another row counts as far.

    ``r_i = mean_j query_i . key_j``; ``t_i`` is the ``max(1, N // 2)``-th largest of ``|r_i - r_j|`` over all j.

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
        scores = torch.einsum("bnc,bmc->bnm", at_least_float32(query), at_least_float32(key))
    row_mean = scores.mean(-1)
    distance = (row_mean.unsqueeze(-1) - row_mean.unsqueeze(-2)).abs()
    rank = max(1, query.shape[1] // 2)
    return row_mean, distance.sort(-1, descending=True).values[..., rank - 1]


def split_attention(
    query: Tensor, key: Tensor, value: Tensor, row_mean: Tensor, threshold: Tensor, *, variant: str = "paper"
) -> Tensor:
    """``z_i = sum_j (a_far_ij + a_near_ij) value_j``: one softmax over the far set of row i, one over its near set.

    Far: ``|r_i - r_j| >= t_i``, and i itself; near: the rest. In each softmax the scores outside its set, and scores
    that are exactly 0, become -100. With ``variant="released"`` the near set of a row with ``t_i >= 1`` is all tokens.

    Args:
        query, key, value: ``[B, N, C]``, one floating dtype; scores take no scale.
        row_mean, threshold: ``[B, N]`` from `split_threshold`, compared in their own dtype.
        variant: ``"paper"`` or ``"released"``.

    Returns:
        ``[B, N, C]`` in the dtype of the inputs (of autocast, where it is on); weights of a row sum to 2. The gradient
        reaches query, key and value, never the split.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or choice.
    """
    check_split_attention(query, key, value, row_mean, threshold, variant)
    distance = (row_mean.unsqueeze(-1) - row_mean.unsqueeze(-2)).abs()
    itself = torch.eye(query.shape[1], dtype=torch.bool, device=query.device)
    far = (distance >= threshold.unsqueeze(-1)) | itself
    near = ~far
    if variant == "released":
        near = near | (threshold >= 1).unsqueeze(-1)
    scores = torch.einsum("bnc,bmc->bnm", query, key)
    scores = scores.masked_fill(scores == 0, FILL)
    weights = softmax_rows(scores.masked_fill(~far, FILL)) + softmax_rows(scores.masked_fill(~near, FILL))
    return torch.einsum("bnm,bmc->bnc", weights, value)
