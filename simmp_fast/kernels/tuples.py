"""Tuples of tiles in kernels: a compile-time number of accumulators or heads."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def append(items, item):
    """A tuple with one more tile."""
    return items + (item,)  # noqa: RUF005  (Triton knows no starred tuples)


@triton.jit
def zero_tiles(COUNT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """`COUNT` float32 accumulators."""
    tiles = ()
    for _ in tl.static_range(COUNT):
        tiles = append(tiles, tl.zeros([ROWS, COLUMNS], tl.float32))
    return tiles
