"""The pieces that the forward and the backward of the split attention share: score tiles, the two sets, their weights.

A tile is queries by keys everywhere, so that every kernel rounds a score in the same way.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..rounding import operand

FILL = tl.constexpr(-100.0)  # the score outside a set, and in place of a score that is exactly 0


@triton.jit
def token_pointers(base, image, tokens, stride_b, stride_n):
    """Pointers to channel 0 of `tokens` in one image, in 64 bits; channels are contiguous."""
    return base + image.to(tl.int64) * stride_b + tokens.to(tl.int64) * stride_n


@triton.jit
def load_chunk(
    pointers, valid, chunk,
    CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr, GROUP: tl.constexpr = 1,
):  # fmt: skip
    """``[tokens, BLOCK_C]``: the channels of one chunk as products of this precision take them, 0 past the last
    token and the last channel. Chunks come in groups of GROUP, the last of which may lie past the last channel.
    """
    channel = chunk * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = valid[:, None]
    if CHANNELS % (BLOCK_C * GROUP) != 0:
        mask = mask & (channel < CHANNELS)[None, :]
    return operand(tl.load(pointers[:, None] + channel[None, :], mask=mask, other=0.0), PRECISION)


@triton.jit
def store_chunk(pointers, valid, chunk, values, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Write one chunk of channels to a contiguous output."""
    channel = chunk * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = valid[:, None] & (channel < CHANNELS)[None, :]
    tl.store(pointers[:, None] + channel[None, :], values.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def dot_tile(
    left, left_valid, right, right_valid,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``[ROWS, COLUMNS]`` float32: the product of every left with every right token over all channels.

    A real loop, not an unrolled one: unrolled, the compiler lifts the left tokens out of the caller's loop and spills.
    """
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for chunk in range(tl.cdiv(CHANNELS, BLOCK_K)):
        a = load_chunk(left, left_valid, chunk, CHANNELS, BLOCK_K, PRECISION)
        b = load_chunk(right, right_valid, chunk, CHANNELS, BLOCK_K, PRECISION)
        total = tl.dot(a, tl.trans(b), total, input_precision=PRECISION)
    return total


@triton.jit
def both_sets(mean_query, mean_key, threshold, diagonal, valid, RELEASED: tl.constexpr):
    """Membership in the far and in the near set, False outside `valid`.

    The distance is compared in the dtype of the row means: a half-precision difference is rounded to it, as arithmetic
    in that dtype would.
    """
    dtype: tl.constexpr = mean_query.dtype
    if dtype == tl.float16 or dtype == tl.bfloat16:
        distance = tl.abs(mean_query.to(tl.float32) - mean_key.to(tl.float32)).to(dtype).to(tl.float32)
    else:
        distance = tl.abs(mean_query - mean_key)
    far = ((distance >= threshold.to(distance.dtype)) | diagonal) & valid
    near = valid & (far == 0)
    if RELEASED:
        near = near | (valid & (threshold.to(distance.dtype) >= 1))
    return far, near


@triton.jit
def exponentials(scores, far, near, far_max, near_max, RELEASED: tl.constexpr):
    """``exp(score - max)`` of the members of each set, 0 elsewhere; disjoint sets need one exponential an element."""
    if RELEASED:
        of_far = tl.exp(scores - far_max)
        of_near = tl.exp(scores - near_max)
    else:
        of_far = tl.exp(scores - tl.where(far, far_max, near_max))
        of_near = of_far
    return tl.where(far, of_far, 0.0), tl.where(near, of_near, 0.0)


@triton.jit
def softmax_weights(
    scores, far, near, valid, far_max, far_inverse, near_max, near_inverse, RELEASED: tl.constexpr
):  # fmt: skip
    """Both softmaxes of a tile, the fill's weight included: ``(far, near)``, 0 outside `valid`."""
    of_far, of_near = exponentials(scores, far, near, far_max, near_max, RELEASED)
    # One number a row: what every element outside the set weighs. It can overflow only where no such element exists.
    far_fill = tl.exp(-far_max + FILL) * far_inverse
    near_fill = tl.exp(-near_max + FILL) * near_inverse
    in_far = tl.where(far, of_far * far_inverse, tl.where(valid, far_fill, 0.0))
    in_near = tl.where(near, of_near * near_inverse, tl.where(valid, near_fill, 0.0))
    return in_far, in_near


@triton.jit
def score_gradient(scores, far, near, in_far, in_near, upstream, far_delta, near_delta):
    """Gradient of the raw scores; a filled score has none. `upstream` is ``dz_i . value_j``."""
    gradient = tl.where(far, in_far * (upstream - far_delta), 0.0)
    gradient += tl.where(near, in_near * (upstream - near_delta), 0.0)
    return tl.where(scores == 0, 0.0, gradient)
