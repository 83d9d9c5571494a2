"""The two softmaxes over the sets of the Euclidean split (section 5.5)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..validation import check_split_attention, product_dtype, transformed
from .precision import at_least_float32, no_autocast

FILL = -100.0
# Up to here the scores are small (the network has N = 196) and one pass over all of them is the fastest; above it rows
# go by chunks of at most CHUNK_SCORES scores, 16 rows at least.
DIRECT_UP_TO = 1024
CHUNK_SCORES = 1 << 20


def _masked(
    scores: Tensor, row_mean: Tensor, threshold: Tensor, start: int, released: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The logits of both softmaxes and the far mask, each ``[B, R, N]``, for scores of the R rows from `start` on.

    Scores are in float32 or better; row_mean ``[B, N]``, threshold ``[B, R]``.
    """
    end = start + scores.shape[1]
    distance = (row_mean[:, start:end].unsqueeze(-1) - row_mean.unsqueeze(-2)).abs()
    places = torch.arange(row_mean.shape[1], device=scores.device)
    far = (distance >= threshold.unsqueeze(-1)) | (places[start:end].unsqueeze(-1) == places)
    scores = scores.masked_fill(scores == 0, FILL)
    near = scores.masked_fill(far & (threshold < 1).unsqueeze(-1) if released else far, FILL)
    return scores.masked_fill(~far, FILL), near, far


def _rows(batch: int, tokens: int) -> int:
    return max(16, CHUNK_SCORES // (batch * tokens))


@torch.library.custom_op("simmp_fast::portable_split_attention", mutates_args=())
def _split(
    query: Tensor, key: Tensor, value: Tensor, row_mean: Tensor, threshold: Tensor, released: bool
) -> tuple[Tensor, Tensor]:
    """Output ``[B, N, C]``, and the logsumexp of both softmaxes ``[2, B, N]``."""
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    logsumexp = torch.empty(
        (2, *row_mean.shape), dtype=torch.promote_types(query.dtype, torch.float32), device=query.device
    )
    with no_autocast(query):
        step = _rows(*row_mean.shape)
        for start in range(0, query.shape[1], step):
            rows = slice(start, start + step)
            scores = at_least_float32(query[:, rows] @ key.mT)
            far, near, _ = _masked(scores, row_mean, threshold[:, rows], start, released)
            weights = torch.zeros_like(scores)
            for logits, saved in zip((far, near), logsumexp[:, :, rows], strict=True):
                saved.copy_(logits.logsumexp(-1))
                weights += logits.sub_(saved.unsqueeze(-1)).exp_()
            output[:, rows] = weights.to(value.dtype) @ value
    return output, logsumexp


@_split.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, row_mean: Tensor, threshold: Tensor, released: bool
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(query.dtype, torch.float32)
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    return output, query.new_empty((2, *row_mean.shape), dtype=dtype)


@torch.library.custom_op("simmp_fast::portable_split_attention_backward", mutates_args=())
def _split_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row_mean: Tensor,
    threshold: Tensor,
    logsumexp: Tensor,
    released: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; rows of scores are computed again, with the exact delta of each softmax."""
    grad_query = torch.empty_like(query, memory_format=torch.contiguous_format)
    grad_key = torch.zeros(key.shape, dtype=logsumexp.dtype, device=key.device)
    grad_value = torch.zeros_like(grad_key)
    with no_autocast(query):
        step = _rows(*row_mean.shape)
        for start in range(0, query.shape[1], step):
            rows = slice(start, start + step)
            products = query[:, rows] @ key.mT
            scores = at_least_float32(products)
            far, near, is_far = _masked(scores, row_mean, threshold[:, rows], start, released)
            is_near = ~(is_far & (threshold[:, rows] < 1).unsqueeze(-1)) if released else ~is_far
            grad_weights = at_least_float32(grad[:, rows] @ value.mT)
            weights, grad_scores = torch.zeros_like(scores), torch.zeros_like(scores)
            for logits, inside, saved in zip((far, near), (is_far, is_near), logsumexp[:, :, rows], strict=True):
                part = logits.sub_(saved.unsqueeze(-1)).exp_()
                weights += part
                delta = (part * grad_weights).sum(-1, keepdim=True)
                grad_scores += (grad_weights - delta).mul_(part).mul_(inside)
            grad_scores = grad_scores.masked_fill_(scores == 0, 0.0).to(products.dtype)
            grad_query[:, rows] = grad_scores @ key
            grad_key += grad_scores.mT @ query[:, rows]
            grad_value += weights.to(value.dtype).mT @ grad[:, rows]
    return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype)


@_split_backward.register_fake
def _(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row_mean: Tensor,
    threshold: Tensor,
    logsumexp: Tensor,
    released: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value))
    return query, key, value


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.released = inputs
    ctx.save_for_backward(*tensors, output[1])


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *_split_backward(grad, *ctx.saved_tensors, ctx.released), None, None, None


_split.register_autograd(_differentiate, setup_context=_save)


def split_attention(
    query: Tensor, key: Tensor, value: Tensor, row_mean: Tensor, threshold: Tensor, *, variant: str = "paper"
) -> Tensor:
    """``z_i = sum_j (a_far_ij + a_near_ij) value_j``: one softmax over the far set of row i, one over its near set.

    Far: ``|r_i - r_j| >= t_i``, and i itself; near: the rest. In each softmax the scores outside its set, and scores
    that are exactly 0, become -100. With ``variant="released"`` the near set of a row with ``t_i >= 1`` is all tokens.

    Short sequences take plain PyTorch; in an exported program and under `torch.func` long ones do too. Above
    `DIRECT_UP_TO` tokens rows go by chunks which the backward pass computes again from two saved logsumexps, so that
    memory grows with N; that form is differentiable once.

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
    row_mean, threshold = row_mean.detach(), threshold.detach()
    dtype, released = product_dtype(query), variant == "released"
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    chunked = query.shape[1] > DIRECT_UP_TO and not (transformed() or torch.compiler.is_exporting())
    if chunked and query.shape[0]:
        return _split(query, key, value, row_mean, threshold, released)[0]
    scores = at_least_float32(query @ key.mT)
    far, near, _ = _masked(scores, row_mean, threshold, 0, released)
    return (far.softmax(-1).to(dtype) + near.softmax(-1).to(dtype)) @ value
