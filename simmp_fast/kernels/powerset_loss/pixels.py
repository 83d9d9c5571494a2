"""The pieces that the loss's forward and backward share: bilinear sources, resized logits, sums of a subset.

Tiles are ``[BLOCK_K classes, pixels]`` with pixels across the threads, so that a thread holds all classes of its pixels
and a softmax over the classes crosses no thread. The heads come as one tuple of pointers; `sizes` holds
``(h_0, w_0, h_1, w_1, ..)``, `strides` four numbers a head.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..tuples import append


@triton.jit
def first_cell(position, cells, pixels):
    """The first cell under a pixel.

    In whole numbers: the cell must come out the same in every kernel, whatever the compiler fuses, since the backward's
    two stages agree on who owns a cell. Exact while ``2 * pixels * cells < 2^31``.
    """
    return tl.maximum((2 * position + 1) * cells - pixels, 0) // (2 * pixels)


@triton.jit
def bilinear_source(position, cells, pixels):
    """First and second cell under a pixel and the weight of the second, ``align_corners=False``."""
    first = first_cell(position, cells, pixels)
    remainder = tl.maximum((2 * position + 1) * cells - pixels, 0) - first * (2 * pixels)
    return first, tl.minimum(first + 1, cells - 1), remainder.to(tl.float32) / (2 * pixels)


@triton.jit
def _load(base, y, x, stride_y, stride_x, mask):
    """``[BLOCK_K, pixels]`` float32 from one cell a pixel, loaded as one row of pixels after the other.

    A two-dimensional gather leaves it to the compiler which axis goes across the threads, and Triton 3.6 takes the
    classes: every softmax would then cross threads and be computed by sixteen of them.
    """
    pointers = base + (y.to(tl.int64) * stride_y + x.to(tl.int64) * stride_x)[None, :]
    flat: tl.constexpr = mask.shape[0] * mask.shape[1]
    found = tl.load(tl.reshape(pointers, [flat]), mask=tl.reshape(mask, [flat]), other=0.0)
    return tl.reshape(found, mask.shape).to(tl.float32)


@triton.jit
def resized_logits(
    head, image, y, x, valid, height, width, pixel_height, pixel_width, stride_b, stride_c, stride_y, stride_x,
    SAME: tl.constexpr, CLASSES: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``[BLOCK_K, pixels]`` float32: one head's logits at the label's pixels, 0 for padded classes and pixels."""
    channel = tl.arange(0, BLOCK_K)
    base = head + image.to(tl.int64) * stride_b + channel.to(tl.int64)[:, None] * stride_c
    mask = (channel < CLASSES)[:, None] & valid[None, :]
    if SAME:
        logits = _load(base, y, x, stride_y, stride_x, mask)
    else:
        top, bottom, down = bilinear_source(y, height, pixel_height)
        left, right, along = bilinear_source(x, width, pixel_width)
        above = _load(base, top, left, stride_y, stride_x, mask) * (1 - along)[None, :]
        above += _load(base, top, right, stride_y, stride_x, mask) * along[None, :]
        below = _load(base, bottom, left, stride_y, stride_x, mask) * (1 - along)[None, :]
        below += _load(base, bottom, right, stride_y, stride_x, mask) * along[None, :]
        logits = above * (1 - down)[None, :] + below * down[None, :]
    return logits


@triton.jit
def all_logits(
    heads, sizes, strides, image, y, x, valid, pixel_height, pixel_width,
    HEADS: tl.constexpr, SAME: tl.constexpr, CLASSES: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tuple with every head's resized logits; bit i of `SAME` says that head i has the label's grid."""
    logits = ()
    for i in tl.static_range(HEADS):
        one = resized_logits(
            heads[i], image, y, x, valid, sizes[2 * i], sizes[2 * i + 1], pixel_height, pixel_width,
            strides[4 * i], strides[4 * i + 1], strides[4 * i + 2], strides[4 * i + 3],
            (SAME >> i) & 1, CLASSES, BLOCK_K,
        )  # fmt: skip
        logits = append(logits, one)
    return logits


@triton.jit
def subset_sum(logits, subset, HEADS: tl.constexpr, CLASSES: tl.constexpr, BLOCK_K: tl.constexpr):
    """Sum of the heads whose bit is set in `subset`, -inf for padded classes."""
    total = logits[0] * (subset & 1)
    for i in tl.static_range(1, HEADS):
        total += logits[i] * ((subset >> i) & 1)
    return tl.where((tl.arange(0, BLOCK_K) < CLASSES)[:, None], total, float("-inf"))
