"""Attention by chunks of queries, for float32 on a CPU.

A CPU is bound by the rate of its products here, and the fused attention of PyTorch takes them from the library that is
slower on AMD processors (see `products`). One chunk of queries meets all keys, so a softmax is complete at once; the
scores of a chunk stay in the last-level cache and are computed again in the backward pass. That pass takes the peak and
the sum of each row as they were: their logsumexp would lose the sum in the rounding of a large peak.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .precision import exp_, no_autocast
from .products import rows_product

# Queries in a chunk, a multiple of 16 for `rows_product`. Measured at N = 3136, C = 96 on one thread: fewer starve the
# products, more leave the cache.
CHUNK = 448
# Keys in a part of the sum over them, and features in a sum that is taken in one run: oneDNN adds up one number after
# the other, MKL in parts. Measured: over 3136 keys one run rounds 2.3 times as much as MKL, parts of 448 1.5 times;
# over 96 to 192 features both round alike, over 256 one run 1.7 times as much.
PART = 448
FEATURES = 192


def _scores(x: Tensor, weight: Tensor) -> Tensor:
    """``x [rows, D] @ weight [columns, D].T``, by the library that rounds no more than the other at this D."""
    return rows_product(x, weight) if x.shape[1] <= FEATURES else x @ weight.t()


def _sum_by_parts(weights: Tensor, values: Tensor) -> Tensor:
    """``weights [rows, N] @ values [D, N].T``, the sum over N in parts."""
    parts = [
        rows_product(part.contiguous(), value.contiguous())
        for part, value in zip(weights.split(PART, 1), values.split(PART, 1), strict=True)
    ]
    return torch.stack(parts).sum(0)


@torch.library.custom_op("simmp_fast::portable_attention", mutates_args=())
def _attention(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output ``[B, N, D]``, peak and sum of exponentials of each row ``[B, N]``; takes contiguous ``[B, N, D]``."""
    output, peak = torch.empty_like(query), query.new_empty(query.shape[:2])
    total = torch.empty_like(peak)
    for b in range(query.shape[0]):
        keys, values = key[b], value[b].t().contiguous()
        for start in range(0, query.shape[1], CHUNK):
            chunk = slice(start, start + CHUNK)
            weights = _scores(query[b, chunk], keys)
            torch.amax(weights, -1, out=peak[b, chunk])
            exp_(weights.sub_(peak[b, chunk].unsqueeze(-1)))
            torch.sum(weights, -1, out=total[b, chunk])
            torch.div(_sum_by_parts(weights, values), total[b, chunk].unsqueeze(-1), out=output[b, chunk])
    return output, peak, total


@_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    row = query.new_empty(query.shape[:2])
    return torch.empty_like(query), row, torch.empty_like(row)


@torch.library.custom_op("simmp_fast::portable_attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, peak: Tensor, total: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value. Scores are held as ``[N, chunk]``, the form that the products to come read;
    the division by the sum of a row is taken on its cotangent, not on its scores. What a row loses to its mean is
    summed from the very numbers it is taken from, so that a row of score gradients sums to zero: the output's rounding,
    or a sum of the forward pass, would leave a remainder that keys with a common offset multiply."""
    grad = (grad / total.unsqueeze(-1)).contiguous()
    grad_query, grad_key, grad_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
    for b in range(query.shape[0]):
        keys, values = key[b], value[b]
        for start in range(0, query.shape[1], CHUNK):
            chunk = slice(start, start + CHUNK)
            rows, grads = query[b, chunk], grad[b, chunk]
            weights = exp_(_scores(keys, rows).sub_(peak[b, chunk]))
            grad_value[b] += rows_product(weights, grads.t().contiguous())
            grad_scores = _scores(values, grads).mul_(weights)
            grad_scores.addcmul_(weights, grad_scores.sum(0) / weights.sum(0), value=-1)
            grad_key[b] += rows_product(grad_scores, rows.t().contiguous())
            torch.mm(grad_scores.t(), keys, out=grad_query[b, chunk])
    return grad_query, grad_key, grad_value


@_attention_backward.register_fake
def _(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, peak: Tensor, total: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, *output[1:])


def _differentiate(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    with no_autocast(grad):  # a backward pass may be asked for inside autocast
        return _attention_backward(grad, *ctx.saved_tensors)


_attention.register_autograd(_differentiate, setup_context=_save)


def chunked_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """``sum_j softmax_j(query_i . key_j) value_j`` of ``[B, N, D]`` each, one floating dtype; ``[B, N, D]``.

    Memory grows with N: one chunk's scores at a time, forward and backward. Differentiable once.
    """
    return _attention(query.contiguous(), key.contiguous(), value.contiguous())[0]
