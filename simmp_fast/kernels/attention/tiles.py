"""Pieces that the forward and the backward kernels share.

A head dim is held as one power of two, or as two (96 = 64 + 32, 192 = 128 + 64): tiles have power-of-two sides,
and padding 96 to 128 would cost a third more products. The second part is absent where `DIM_B` is 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..rounding import operand

LOG2E = tl.constexpr(1.4426950408889634)


def split_dim(dim: int, dtype: str) -> tuple[int, int]:
    """The two power-of-two parts that hold `dim` channels in a dtype class; the second is 0 where one does as well.

    A float32 part has at most 128 channels: without tensor cores a product holds a row of each operand in registers.
    """
    whole = max(16, triton.next_power_of_2(dim))
    first = whole // 2
    if first < 16 or (dim == whole and (dtype == "half" or whole <= 128)):
        return whole, 0
    second = max(16, triton.next_power_of_2(dim - first))
    must = dtype != "half" and whole > 128
    return (first, second) if must or first + second < whole else (whole, 0)


@triton.jit
def exponential(x):
    """``exp(x)``. A score and its maximum are subtracted before they are scaled, so large scores lose nothing."""
    return tl.exp2(x * LOG2E)


@triton.jit
def load_rows(
    base, rows, stride_n, valid,
    FIRST: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
    LAST: tl.constexpr = False,
):  # fmt: skip
    """``[rows, WIDTH]``: channels FIRST.. of rows of `base`; 0 past DIM, and where not `valid` if MASKED.

    As products of this precision take them.
    """
    column = FIRST + tl.arange(0, WIDTH)
    pointers = base + rows[:, None] * stride_n + column[None, :]
    policy: tl.constexpr = "evict_first" if LAST else ""
    if FIRST + WIDTH > DIM:
        tile = tl.load(pointers, mask=valid[:, None] & (column < DIM)[None, :], other=0.0, eviction_policy=policy)
    elif MASKED:
        tile = tl.load(pointers, mask=valid[:, None], other=0.0, eviction_policy=policy)
    else:
        tile = tl.load(pointers, eviction_policy=policy)
    return operand(tile, PRECISION)


@triton.jit
def load_again(
    part_a, part_b, base, rows, stride_n, valid,
    DIM: tl.constexpr, DIM_A: tl.constexpr, DIM_B: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Both parts of a tile behind a loop that used them: float32 is read anew.

    For the products behind the loop Triton 3.6 would arrange the tile before it, and 32 bits an element would fill the
    registers. The other eviction policy keeps this load from being joined with the first.
    """
    if base.dtype.element_ty == tl.float32:
        part_a = load_rows(base, rows, stride_n, valid, 0, DIM_A, DIM, PRECISION, True, True)
        part_b = part_a
        if DIM_B:
            part_b = load_rows(base, rows, stride_n, valid, DIM_A, DIM_B, DIM, PRECISION, True, True)
    return part_a, part_b


@triton.jit
def store_rows(base, rows, stride_n, valid, tile, FIRST: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr):
    """Write ``[rows, WIDTH]`` to channels FIRST.. of the valid rows of `base`, rounded to its dtype."""
    column = FIRST + tl.arange(0, WIDTH)
    pointers = base + rows[:, None] * stride_n + column[None, :]
    mask = valid[:, None] & (column < DIM)[None, :]
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def product(
    left_a, left_b, right_a, right_b, DIM_B: tl.constexpr, PRECISION: tl.constexpr, APART: tl.constexpr = False
):
    """``left right^T`` over both parts of the head dim, float32.

    Without tensor cores a product is one long chain of additions. With APART the parts are added up first, which keeps
    the rounding of 256 channels within what PyTorch's products have; written as a sum the compiler would chain them
    again. It takes registers that the backward does not have.
    """
    total = tl.dot(left_a, tl.trans(right_a), input_precision=PRECISION)
    if DIM_B:
        if APART and PRECISION == "ieee" and left_b.dtype == tl.float32:
            total -= tl.dot(-left_b, tl.trans(right_b), input_precision=PRECISION)
        else:
            total = tl.dot(left_b, tl.trans(right_b), total, input_precision=PRECISION)
    return total


@triton.jit
def next_cluster(cluster, after, clusters):
    """The lowest cluster above `after` that occurs in the tile; `clusters` where there is none."""
    return tl.min(tl.where((cluster > after) & (cluster < clusters), cluster, clusters), 0)
