"""Attention by chunks of queries, for a CPU.

The definition, one chunk of queries at a time. A chunk meets all keys, so its softmax is complete at once, and its
scores lie in the cache for the passes over them; the backward pass computes them again. Every product and every softmax
is the definition's own call on fewer rows, and so are their roundings. The fused attention of PyTorch is as fast on a
CPU, but its backward pass starts from one logsumexp a row, in whose rounding a large score hides the sum: on inputs of
the network its gradients had three times the error of the definition.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .precision import no_autocast

# Queries in a chunk. Measured at N = 784 to 12544 and 32 to 384 features, on one core and on two: fewer starve the
# products, more leave the cache. Divides the token counts of the network, so that no short chunk is left over.
CHUNK = 392


def _chunks(rows: int) -> list[slice]:
    return [slice(start, min(start + CHUNK, rows)) for start in range(0, rows, CHUNK)]


@torch.library.custom_op("simmp_fast::portable_attention", mutates_args=())
def _attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Takes contiguous ``[B, N, D]``, gives ``[B, N, D]``."""
    output = torch.empty_like(query)
    scores, weights = query.new_empty(2, min(CHUNK, query.shape[1]), key.shape[1]).unbind()
    for q, k, v, out in zip(query, key, value, output, strict=True):
        for chunk in _chunks(query.shape[1]):
            s, w = scores[: chunk.stop - chunk.start], weights[: chunk.stop - chunk.start]
            torch.mm(q[chunk], k.t(), out=s)
            torch.softmax(s, -1, out=w)
            torch.mm(w, v, out=out[chunk])
    return output


@_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.empty_like(query)


@torch.library.custom_op("simmp_fast::portable_attention_backward", mutates_args=())
def _attention_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; takes contiguous ``[B, N, D]``."""
    grads = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
    scores, weights = query.new_empty(2, min(CHUNK, query.shape[1]), key.shape[1]).unbind()
    for q, k, v, g, grad_q, grad_k, grad_v in zip(query, key, value, grad, *grads, strict=True):
        for chunk in _chunks(query.shape[1]):
            s, w = scores[: chunk.stop - chunk.start], weights[: chunk.stop - chunk.start]
            torch.mm(q[chunk], k.t(), out=s)
            torch.softmax(s, -1, out=w)
            grad_v.addmm_(w.t(), g[chunk])
            torch.mm(g[chunk], v.t(), out=s)
            torch.ops.aten._softmax_backward_data.out(s, w, -1, s.dtype, grad_input=s)
            grad_k.addmm_(s.t(), q[chunk])
            torch.mm(s, k, out=grad_q[chunk])
    return grads


@_attention_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    with no_autocast(grad):  # a backward pass may be asked for inside autocast
        return _attention_backward(grad.contiguous(), *ctx.saved_tensors)


_attention.register_autograd(_differentiate, setup_context=_save)


def chunked_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """``sum_j softmax_j(query_i . key_j) value_j`` of ``[B, N, D]`` each, one floating dtype; ``[B, N, D]``.

    Memory grows with N: one chunk's scores at a time, forward and backward. Differentiable once.
    """
    return _attention(query.contiguous(), key.contiguous(), value.contiguous())
