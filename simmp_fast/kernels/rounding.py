"""Operands of TF32 products: rounded to TF32 before the matrix unit sees them.

The unit reads the upper 19 bits of a float32 and drops the others: a truncation, always towards zero, with up to twice
the error of rounding. cuBLAS rounds its operands to nearest, ties away from zero; so does this.
"""

from __future__ import annotations

import triton
import triton.language as tl

# The interpreter knows no assembly; it rounds the bits by arithmetic, with the same result.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def to_tf32(tile):
    """A float32 tile rounded to TF32 (10 bits of fraction), ties away from zero; infinities and NaN are kept.

    The assembly is called impure though it is not: the compiler would move a pure one behind the tile's way through
    shared memory and round every copy in the registers of every warp, which spilled up to 570 bytes a thread.
    """
    if INTERPRETED:
        bits = (tile.to(tl.uint32, bitcast=True) + 0x1000) & 0xFFFFE000
        tile = tl.where(tile == tile, bits.to(tl.float32, bitcast=True), tile)
    else:
        tile = tl.inline_asm_elementwise(
            "cvt.rna.tf32.f32 $0, $1;", "=r,r", [tile], dtype=tl.float32, is_pure=False, pack=1
        )
    return tile


@triton.jit
def operand(tile, PRECISION: tl.constexpr):
    """A tile as products of this `input_precision` take it: once a tile, however many products follow."""
    ROUND: tl.constexpr = PRECISION == "tf32" and tile.dtype == tl.float32
    if ROUND:
        tile = to_tf32(tile)
    return tile


if INTERPRETED.value:
    # The interpreter sets up every call of a compiled function anew, which takes longer than what these do.
    to_tf32, operand = to_tf32.fn, operand.fn
