"""Forward kernels of the subset loss (section 7): sums over a tile of pixels, then the terms of every subset.

First stage: a program owns `BLOCK_P` pixels of one image. Every head's logits are read once, resized in registers and
kept there for all ``2^HEADS - 1`` subsets; for each subset the program reduces overlap ``sum p y`` and square
``sum p^2`` of every class and the cross-entropy over its pixels and writes them to its own place in
``partials [2^HEADS, tiles, 2 CLASSES + 1]``. The empty subset's place holds the label counts.
Second stage: a program owns one subset, adds the tiles in a fixed order, and writes its term of the loss and the
coefficients with which the backward pass needs no sum over pixels. No atomics: equal input, equal bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .pixels import all_logits, subset_sum


@triton.jit
def powerset_loss_sums(
    heads, sizes, strides, label, partials, pixel_height, pixel_width, label_b, label_y, label_x,
    HEADS: tl.constexpr, SAME: tl.constexpr, CLASSES: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    pixels = pixel_height * pixel_width
    tiles_per_image = tl.cdiv(pixels, BLOCK_P)
    image = tile // tiles_per_image
    pixel = tile % tiles_per_image * BLOCK_P + tl.arange(0, BLOCK_P)
    valid = pixel < pixels
    y = pixel // pixel_width
    x = pixel % pixel_width
    place = image.to(tl.int64) * label_b + y.to(tl.int64) * label_y + x.to(tl.int64) * label_x
    named = tl.load(label + place, mask=valid, other=-1)
    target = named.to(tl.int32)
    logits = all_logits(
        heads, sizes, strides, image, y, x, valid, pixel_height, pixel_width, HEADS, SAME, CLASSES, BLOCK_K
    )
    channel = tl.arange(0, BLOCK_K)
    hit = channel[:, None] == target[None, :]
    # A label outside of the classes makes the loss NaN; what lies past the image counts for nothing.
    known = valid & (named >= 0) & (named < CLASSES)
    otherwise = tl.where(valid, float("nan"), 0.0)
    width = 2 * CLASSES + 1
    row = partials + tile.to(tl.int64) * width
    tl.store(row + channel, tl.sum(hit.to(tl.float32), 1), mask=channel < CLASSES)
    for subset in range(1, 1 << HEADS):
        total = subset_sum(logits, subset, HEADS, CLASSES, BLOCK_K)
        maximum = tl.max(total, 0)
        exponentials = tl.exp(total - maximum[None, :])
        normaliser = tl.sum(exponentials, 0)
        probability = exponentials * tl.where(valid, 1.0 / normaliser, 0.0)[None, :]
        at_label = tl.sum(tl.where(hit, total, 0.0), 0)
        entropy = tl.where(known, (maximum - at_label) + tl.log(normaliser), otherwise)
        row += tl.num_programs(0).to(tl.int64) * width
        tl.store(row + channel, tl.sum(tl.where(hit, probability, 0.0), 1), mask=channel < CLASSES)
        tl.store(row + CLASSES + channel, tl.sum(probability * probability, 1), mask=channel < CLASSES)
        tl.store(row + 2 * CLASSES, tl.sum(entropy, 0))


@triton.jit
def powerset_loss_terms(
    partials, subset_weight, terms, coefficients, tiles, pixels, ce_weight, dice_weight, smooth,
    WEIGHTED: tl.constexpr, CLASSES: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Term and coefficients ``(alpha, beta, gamma)`` of one subset; `pixels` is a float: all pixels of the batch.

    ``d term / d z_c = p_c (q_c - sum p q) + gamma (p_c - y_c)`` with ``q_c = alpha_c y_c + beta_c p_c``.
    """
    subset = tl.program_id(0) + 1
    channel = tl.arange(0, BLOCK_K)
    inside = channel < CLASSES
    width = 2 * CLASSES + 1
    overlap = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
    square = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
    count = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
    entropy = tl.zeros([BLOCK_T], tl.float32)
    for start in range(0, tiles, BLOCK_T):
        tile = start + tl.arange(0, BLOCK_T)
        mask = (tile < tiles)[:, None] & inside[None, :]
        empty = partials + tile.to(tl.int64) * width
        row = empty + subset.to(tl.int64) * tiles * width
        overlap += tl.load(row[:, None] + channel[None, :], mask=mask, other=0.0)
        square += tl.load(row[:, None] + CLASSES + channel[None, :], mask=mask, other=0.0)
        count += tl.load(empty[:, None] + channel[None, :], mask=mask, other=0.0)
        entropy += tl.load(row + 2 * CLASSES, mask=tile < tiles, other=0.0)
    surprise = tl.sum(entropy, 0)
    numerator = 2 * tl.sum(overlap, 0) + smooth
    denominator = tl.sum(square, 0) + tl.sum(count, 0) + smooth
    # Rounded to nearest, so that a class without an error has a Dice loss of exactly 0.
    dice = tl.sum(tl.where(inside, 1 - tl.div_rn(numerator, denominator), 0.0), 0) / CLASSES
    weight = 1.0
    if WEIGHTED:
        weight = tl.load(subset_weight + subset - 1)
    tl.store(terms + subset - 1, weight * (ce_weight * (surprise / pixels) + dice_weight * dice))
    scale = weight * dice_weight * 2 / CLASSES
    row = coefficients + (subset - 1) * width
    tl.store(row + channel, -scale / denominator, mask=inside)
    tl.store(row + CLASSES + channel, scale * numerator / denominator / denominator, mask=inside)
    # NaN for a label outside, whatever the weights: it goes into every gradient.
    tl.store(row + 2 * CLASSES, weight * ce_weight / pixels + tl.where(surprise == surprise, 0.0, surprise))
