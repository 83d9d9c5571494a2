"""Attention of every token to every token of its image (section 2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..validation import check_context_attention
from .precision import no_autocast, product_dtype


def context_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """``ctx_i = sum_j softmax_j(query_i . key_j) value_j``, without a scale factor.

    By `scaled_dot_product_attention` with scale 1 and one head: no ``[N, N]`` tensor on any device that has a fused
    form. Half precision on a CPU is computed in float32: the fused backward takes its row means from the rounded
    output, which keys with a common offset turn into more than twice the error of the definition.

    Args:
        query, key, value: ``[B, N, D]``, one floating dtype.

    Returns:
        ``[B, N, D]`` in the dtype of the inputs (of autocast, where it is on).

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or device.
    """
    check_context_attention(query, key, value)
    dtype = product_dtype(query)
    if query.device.type == "cpu" and dtype in (torch.bfloat16, torch.float16):
        with no_autocast(query):
            query, key, value = (x.to(dtype).float() for x in (query, key, value))
            return context_attention(query, key, value).to(dtype)
    # The fused forms need a last dimension without gaps; without it (channels-first maps seen as tokens) PyTorch would
    # take the one that holds all scores.
    query, key, value = ((x if x.stride(-1) == 1 else x.contiguous()).unsqueeze(1) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, scale=1.0).squeeze(1)
