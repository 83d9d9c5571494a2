"""Attention of every token to every token of its image (section 2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..validation import check_context_attention, product_dtype, transformed
from .chunked_attention import CHUNK, chunked_attention
from .precision import no_autocast

CUDNN_MULTIPLE = 8  # of channels: what cuDNN's attention takes in half precision


def context_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """``ctx_i = sum_j softmax_j(query_i . key_j) value_j``, without a scale factor.

    By `scaled_dot_product_attention` with scale 1 and one head: no ``[N, N]`` tensor on any device that has a fused
    form. On a CPU by the definition's own calls, in chunks of queries where there are many, and in half precision with
    float32 inside: the gradients of the fused form there are off by more than twice the definition's error where scores
    are large or keys have a common offset, and so are those of the form that a GPU has where D is no multiple of 8. An
    exported program has the fused form: it must run without this package. Under `torch.func` and forward-mode AD there
    are no chunks.

    Args:
        query, key, value: ``[B, N, D]``, one floating dtype.

    Returns:
        ``[B, N, D]`` in the dtype of the inputs (of autocast, where it is on).

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or device.
    """
    check_context_attention(query, key, value)
    dtype = product_dtype(query)
    fused = query.device.type != "cpu" and query.shape[-1] % CUDNN_MULTIPLE == 0
    if not fused and dtype in (torch.bfloat16, torch.float16):
        with no_autocast(query):
            query, key, value = (x.to(dtype).float() for x in (query, key, value))
            return context_attention(query, key, value).to(dtype)
    # An empty batch has no fused form: on a GPU it returns nothing at all.
    if query.shape[0] == 0 or (query.device.type == "cpu" and not torch.compiler.is_exporting()):
        if query.shape[1] > CHUNK and not transformed():
            return chunked_attention(query, key, value)
        return torch.bmm(torch.bmm(query, key.mT).softmax(-1), value)
    # The fused forms need a last dimension without gaps; without it (channels-first maps seen as tokens) PyTorch would
    # take the one that holds all scores.
    query, key, value = ((x if x.stride(-1) == 1 else x.contiguous()).unsqueeze(1) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, scale=1.0).squeeze(1)
