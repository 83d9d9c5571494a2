"""Which cells of a low-resolution head a tile of label pixels can touch, and where tiles leave their partial sums."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import triton


def most_cells(tile: int, cells: int, pixels: int) -> int:
    """The most cells along one axis that `tile` neighbouring pixels can touch."""
    return -(-(tile - 1) * cells // pixels) + 2


def most_tiles(tile: int, cells: int, pixels: int) -> int:
    """The most tiles along one axis with a pixel that touches one cell: it touches less than two cells' pixels."""
    return (2 * pixels // cells + 2) // tile + 2


def same_grid(heads: Sequence[Sequence[int]], size: Sequence[int]) -> int:
    """Bit i says that head i, ``(height, width)``, has the label's grid."""
    return sum((tuple(head) == tuple(size)) << i for i, head in enumerate(heads))


@dataclass(frozen=True)
class Tiling:
    """The backward's tiles over one batch of labels, and the cells they touch in every head.

    Args:
        tiles: number of tiles over the batch.
        cells_y, cells_x: rows and columns of cells a tile touches, a head.
        cells: their product, as a power of two that a matrix product takes.
        spans: rows and columns of tiles over a cell, a head; one after the other.
        offsets: where a head's partial sums begin in the workspace, in elements.
        workspace: its size in elements.
        blocks: blocks of the second stage over one plane of the largest resized head; 0 where none is resized.
    """

    tiles: int
    cells_y: tuple[int, ...]
    cells_x: tuple[int, ...]
    cells: tuple[int, ...]
    spans: tuple[int, ...]
    offsets: tuple[int, ...]
    workspace: int
    blocks: int


def tiling(
    heads: Sequence[Sequence[int]], size: Sequence[int], images: int, classes: int, tile: Sequence[int], block: int
) -> Tiling:
    """Lay `tile` (rows, columns of pixels) over labels of `size`, for heads of the given ``(height, width)``."""
    tiles = images * -(-size[0] // tile[0]) * -(-size[1] // tile[1])
    cells_y, cells_x = (tuple(most_cells(tile[a], h[a], size[a]) for h in heads) for a in (0, 1))
    same = same_grid(heads, size)
    offsets, total = [], 0
    for i, (rows, columns) in enumerate(zip(cells_y, cells_x, strict=True)):
        offsets.append(total)
        if not (same >> i) & 1:
            total += tiles * classes * rows * columns
    resized = [-(-h[0] * h[1] // block) for i, h in enumerate(heads) if not (same >> i) & 1]
    return Tiling(
        tiles, cells_y, cells_x,
        tuple(max(16, triton.next_power_of_2(a * b)) for a, b in zip(cells_y, cells_x, strict=True)),
        tuple(most_tiles(tile[a], h[a], size[a]) for h in heads for a in (0, 1)),
        tuple(offsets), total, max(resized, default=0),
    )  # fmt: skip
