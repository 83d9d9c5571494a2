"""The split attention as an operator: launches, registration, gradients, autocast and operation counts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import limits
from ...validation import check_split_attention
from ..configs import Config, pick
from ..launch import check_launchable, dot_precision, dtype_class, launch, rows_contiguous
from ..register import autocast, autograd, flops, lower, operator
from .table import KERNELS, WIDEST


def split_attention(
    query: Tensor, key: Tensor, value: Tensor, row_mean: Tensor, threshold: Tensor, *, variant: str = "paper"
) -> Tensor:
    """``z_i = sum_j (a_far_ij + a_near_ij) value_j``: one softmax over the far set of row i, one over its near set.

    Far: ``|r_i - r_j| >= t_i``, and i itself; near: the rest (section 5.4). In each softmax the scores outside its set,
    and scores that are exactly 0, become -100 (section 5.5). With ``variant="released"`` the near set of a row with
    ``t_i >= 1`` is all tokens. Memory is linear in N; gradients are deterministic.

    Args:
        query, key, value: ``[B, N, C]``, one of float32, bfloat16, float16; C up to 65536.
        row_mean, threshold: ``[B, N]`` from `split_threshold`, compared in their own dtype.
        variant: ``"paper"`` or ``"released"``.

    Returns:
        ``[B, N, C]`` in the dtype of the inputs (of autocast, where it is on). The gradient reaches query, key and
        value, never the split.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or choice.
    """
    check_split_attention(query, key, value, row_mean, threshold, variant)
    limits.check(limits.split(query))
    split = row_mean.detach(), threshold.detach()
    return torch.ops.simmp_fast.split_attention(query, key, value, *split, variant == "released")[0]


def _forward_fake(
    query: Tensor, key: Tensor, value: Tensor, row_mean: Tensor, threshold: Tensor, released: bool
) -> tuple[Tensor, Tensor]:
    images, tokens, _ = query.shape
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    return output, query.new_empty((4, images, tokens), dtype=torch.float32)


def _grid(config: Config, shape: torch.Size, block: str, *more: int) -> tuple[int, ...]:
    """Blocks of tokens over all images, then groups of output channels."""
    images, tokens, channels = shape
    groups = -(-channels // (config.tiles["BLOCK_C"] * config.tiles["GROUP"]))
    return (images * -(-tokens // config.tiles[block]), groups, *more)


def _steps(*tensors: Tensor) -> list[int]:
    """Batch and row strides, one after the other, as the kernels take them."""
    return [step for x in tensors for step in x.stride()[:2]]


@operator("split_attention", _forward_fake)
def _forward(
    query: Tensor, key: Tensor, value: Tensor, row_mean: Tensor, threshold: Tensor, released: bool
) -> tuple[Tensor, Tensor]:
    """The result, and the statistics of both softmaxes that the gradient needs."""
    check_launchable(query=query, key=key, value=value)
    output, statistics = _forward_fake(query, key, value, row_mean, threshold, released)
    if output.numel() == 0:
        return output, statistics
    images, tokens, channels = query.shape
    inputs = [rows_contiguous(x) for x in (query, key, value)]
    kind = dtype_class(query.dtype)
    config = pick("split_attention_forward", kind, min(channels, WIDEST), query.device)
    launch(
        KERNELS["split_attention_forward"], _grid(config, query.shape, "BLOCK_M"), config, query.device,
        *inputs, row_mean.contiguous(), threshold.contiguous(), output, statistics, tokens, images * tokens,
        *_steps(*inputs), CHANNELS=channels, RELEASED=released, PRECISION=dot_precision(kind),
    )  # fmt: skip
    return output, statistics


def _backward_fake(
    upstream: Tensor, query: Tensor, key: Tensor, value: Tensor, row_mean: Tensor, threshold: Tensor,
    statistics: Tensor, released: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    gradient = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    return gradient, torch.empty_like(gradient), torch.empty_like(gradient)


@operator("split_attention_backward", _backward_fake)
def _backward(
    upstream: Tensor, query: Tensor, key: Tensor, value: Tensor, row_mean: Tensor, threshold: Tensor,
    statistics: Tensor, released: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    check_launchable(query=query, key=key, value=value)
    gradients = _backward_fake(upstream, query, key, value, row_mean, threshold, statistics, released)
    if query.numel() == 0:
        return gradients
    images, tokens, channels = query.shape
    inputs = [rows_contiguous(x) for x in (query, key, value)]
    upstream = rows_contiguous(upstream.to(query.dtype))
    split = row_mean.contiguous(), threshold.contiguous()
    deltas = query.new_empty((2, images, tokens), dtype=torch.float32)
    kind = dtype_class(query.dtype)
    constants: dict[str, Any] = {"CHANNELS": channels, "RELEASED": released, "PRECISION": dot_precision(kind)}
    sizes = (tokens, images * tokens, *_steps(*inputs, upstream))
    config = pick("split_attention_query", kind, min(channels, WIDEST), query.device)
    launch(
        KERNELS["split_attention_query"], _grid(config, query.shape, "BLOCK_M"), config, query.device,
        *inputs, *split, statistics, upstream, gradients[0], deltas, *sizes, **constants,
    )  # fmt: skip
    config = pick("split_attention_key_value", kind, min(channels, WIDEST), query.device)
    launch(
        KERNELS["split_attention_key_value"], _grid(config, query.shape, "BLOCK_N", 2), config, query.device,
        *inputs, *split, statistics, upstream, deltas, *gradients[1:], *sizes, **constants,
    )  # fmt: skip
    return gradients


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.released = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, output[1])


def _gradient(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    back = torch.ops.simmp_fast.split_attention_backward
    return (*back(upstream, *ctx.saved_tensors, ctx.released), None, None, None)


autograd(_forward, _keep, _gradient)


def _autocast(dtype: torch.dtype, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    low = (lower(x, dtype) for x in (query, key, value))
    return torch.ops.simmp_fast.split_attention(*low, *rest)


autocast("split_attention", _autocast)


# Operations needed, two for a multiply-add: two products over all pairs forward, five backward.


def _forward_flops(query: Any, *_: Any, **__: Any) -> int:
    images, tokens, channels = query
    return 4 * images * tokens * tokens * channels


def _backward_flops(upstream: Any, *_: Any, **__: Any) -> int:
    return _forward_flops(upstream) * 5 // 2


flops("split_attention", _forward_flops)
flops("split_attention_backward", _backward_flops)
