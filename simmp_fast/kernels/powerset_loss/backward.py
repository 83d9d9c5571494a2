"""Backward kernels of the subset loss: one pass over the pixels, then the sum of the few tiles that share a cell.

First stage: a program owns `TILE_Y x TILE_X` pixels of one image, reads every head's logits once, and holds the
gradient of every resized head in registers over all subsets. Resizing is linear, so the gradient of a head's cells is a
small product ``[classes, pixels] x [pixels, cells]`` with the bilinear weights of the `CELLS_Y x CELLS_X` cells that
the tile can touch; it goes to the program's own place in the workspace. A head with the label's grid is written at
once.
Second stage: a program owns cells of one head and adds the tiles over each in a fixed order. The workspace is about the
size of the low-resolution gradients times the overlap of tiles; nothing of the size of the resized logits exists, and
nothing is computed twice (a gather from the pixels would repeat all softmaxes up to four times a head). No atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..tuples import append, zero_tiles
from .pixels import all_logits, bilinear_source, first_cell, subset_sum


@triton.jit
def _touch(position, first_cell, offsets, cells, pixels):
    """``[pixels, offsets]``: the weight of cell ``first_cell + offset`` at every position along one axis."""
    first, second, weight = bilinear_source(position, cells, pixels)
    cell = (first_cell + offsets)[None, :]
    below = tl.where(first[:, None] == cell, 1 - weight[:, None], 0.0)
    return below + tl.where(second[:, None] == cell, weight[:, None], 0.0)


@triton.jit
def powerset_loss_pixel_backward(
    heads, gradients, sizes, strides, offsets, label, coefficients, upstream, workspace, pixel_height, pixel_width,
    label_b, label_y, label_x,
    CELLS_Y: tl.constexpr, CELLS_X: tl.constexpr, CELLS: tl.constexpr,
    HEADS: tl.constexpr, SAME: tl.constexpr, CLASSES: tl.constexpr, BLOCK_K: tl.constexpr,
    TILE_Y: tl.constexpr, TILE_X: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    tiles_x = tl.cdiv(pixel_width, TILE_X)
    tiles_per_image = tl.cdiv(pixel_height, TILE_Y) * tiles_x
    image = tile // tiles_per_image
    top = tile % tiles_per_image // tiles_x * TILE_Y
    left = tile % tiles_x * TILE_X
    pixel = tl.arange(0, TILE_Y * TILE_X)
    y = top + pixel // TILE_X
    x = left + pixel % TILE_X
    valid = (y < pixel_height) & (x < pixel_width)
    place = image.to(tl.int64) * label_b + y.to(tl.int64) * label_y + x.to(tl.int64) * label_x
    target = tl.load(label + place, mask=valid, other=-1).to(tl.int32)
    logits = all_logits(
        heads, sizes, strides, image, y, x, valid, pixel_height, pixel_width, HEADS, SAME, CLASSES, BLOCK_K
    )
    channel = tl.arange(0, BLOCK_K)
    inside = channel < CLASSES
    hit = channel[:, None] == target[None, :]
    totals = zero_tiles(HEADS, BLOCK_K, TILE_Y * TILE_X)
    for subset in range(1, 1 << HEADS):
        row = coefficients + (subset - 1) * (2 * CLASSES + 1)
        alpha = tl.load(row + channel, mask=inside, other=0.0)
        beta = tl.load(row + CLASSES + channel, mask=inside, other=0.0)
        gamma = tl.load(row + 2 * CLASSES)
        total = subset_sum(logits, subset, HEADS, CLASSES, BLOCK_K)
        exponentials = tl.exp(total - tl.max(total, 0)[None, :])
        probability = exponentials * (1.0 / tl.sum(exponentials, 0))[None, :]
        pull = tl.where(hit, alpha[:, None], 0.0) + beta[:, None] * probability
        pull = pull - tl.sum(probability * pull, 0)[None, :]
        change = probability * pull + gamma * (probability - tl.where(hit, 1.0, 0.0))
        updated = ()
        for i in tl.static_range(HEADS):
            updated = append(updated, totals[i] + change * ((subset >> i) & 1))
        totals = updated

    for i in tl.static_range(HEADS):
        total = tl.where(valid[None, :], totals[i], 0.0)
        if (SAME >> i) & 1:
            plane = (image.to(tl.int64) * CLASSES + channel) * pixel_height * pixel_width
            out = gradients[i] + plane[:, None] + (y * pixel_width + x)[None, :]
            values = (total * tl.load(upstream)).to(gradients[i].dtype.element_ty)
            tl.store(out, values, mask=inside[:, None] & valid[None, :])
        else:
            first_y = first_cell(top, sizes[2 * i], pixel_height)
            first_x = first_cell(left, sizes[2 * i + 1], pixel_width)
            slot = tl.arange(0, CELLS[i])
            weights = _touch(y, first_y, slot // CELLS_X[i], sizes[2 * i], pixel_height)
            weights *= _touch(x, first_x, slot % CELLS_X[i], sizes[2 * i + 1], pixel_width)
            cells = tl.dot(total, weights, input_precision="tf32x3")
            slots = CELLS_Y[i] * CELLS_X[i]
            out = workspace + offsets[i] + (tile.to(tl.int64) * CLASSES + channel)[:, None] * slots + slot[None, :]
            tl.store(out, cells, mask=inside[:, None] & (slot < slots)[None, :])


@triton.jit
def _tile_span(cell, cells, pixels, TILE: tl.constexpr):
    """First and last tile along one axis with a pixel whose bilinear source can be `cell`."""
    first = ((2 * cell - 1) * pixels - cells) // (2 * cells)
    last = ((2 * cell + 3) * pixels - cells) // (2 * cells) + 1
    return tl.maximum(first, 0) // TILE, tl.minimum(last, pixels - 1) // TILE


@triton.jit
def powerset_loss_cell_backward(
    gradients, sizes, offsets, spans, upstream, workspace, blocks, pixel_height, pixel_width,
    CELLS_Y: tl.constexpr, CELLS_X: tl.constexpr,
    HEADS: tl.constexpr, SAME: tl.constexpr, CLASSES: tl.constexpr,
    TILE_Y: tl.constexpr, TILE_X: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Axis 0 of the grid counts planes (image and class) times `blocks`, those of the largest head; axis 1 is the head.

    `spans` holds the most tiles over a cell, ``(rows, columns)`` a head.
    """
    plane = tl.program_id(0) // blocks
    image = (plane // CLASSES).to(tl.int64)
    channel = plane % CLASSES
    cell = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    tiles_x = tl.cdiv(pixel_width, TILE_X)
    first_tile = image * (tl.cdiv(pixel_height, TILE_Y) * tiles_x)
    scale = tl.load(upstream)
    for i in tl.static_range(HEADS):
        if (SAME >> i) & 1 == 0 and tl.program_id(1) == i:
            height = sizes[2 * i]
            width = sizes[2 * i + 1]
            cell_y = cell // width
            cell_x = cell % width
            valid = cell < height * width
            first_y, last_y = _tile_span(cell_y, height, pixel_height, TILE_Y)
            first_x, last_x = _tile_span(cell_x, width, pixel_width, TILE_X)
            total = tl.zeros([BLOCK], tl.float32)
            for row in range(spans[2 * i]):
                tile_y = first_y + row
                slot_y = cell_y - first_cell(tile_y * TILE_Y, height, pixel_height)
                held_y = valid & (tile_y <= last_y) & (slot_y >= 0) & (slot_y < CELLS_Y[i])
                for column in range(spans[2 * i + 1]):
                    tile_x = first_x + column
                    slot_x = cell_x - first_cell(tile_x * TILE_X, width, pixel_width)
                    held = held_y & (tile_x <= last_x) & (slot_x >= 0) & (slot_x < CELLS_X[i])
                    tile = first_tile + tile_y * tiles_x + tile_x
                    place = (tile * CLASSES + channel) * (CELLS_Y[i] * CELLS_X[i]) + slot_y * CELLS_X[i] + slot_x
                    total += tl.load(workspace + offsets[i] + place, mask=held, other=0.0)
            out = gradients[i] + plane.to(tl.int64) * (height * width) + cell
            tl.store(out, (total * scale).to(gradients[i].dtype.element_ty), mask=valid)
