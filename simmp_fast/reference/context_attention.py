"""Attention of every token to every token of its image (section 2)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..validation import check_context_attention
from .precision import softmax_rows


def context_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """``ctx_i = sum_j softmax_j(query_i . key_j) value_j``, without a scale factor.

    Args:
        query, key, value: ``[B, N, D]``, one floating dtype.

    Returns:
        ``[B, N, D]`` in the dtype of the inputs (of autocast, where it is on).

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or device.
    """
    check_context_attention(query, key, value)
    scores = torch.einsum("bnd,bmd->bnm", query, key)
    return torch.einsum("bnm,bmd->bnd", softmax_rows(scores), value)
