"""Which prototype a token is nearest to: the device function that every DMW-LA kernel shares.

A tile of tokens meets all prototypes in chunks of channels: the similarities stay in registers, tokens and prototypes
pass through shared memory, and nothing of size ``[T, K]`` is written. The norm of the token scales a whole row and so
cannot change its largest entry: it is never computed.
"""

from __future__ import annotations

import triton
import triton.language as tl

NORM_FLOOR = tl.constexpr(1e-8)
CHUNK = tl.constexpr(32)  # channels at a time, where a kernel has no reason for another number


@triton.jit
def nearest_prototype(
    tokens, rows, stride_n, valid, prototypes, clusters,
    DIM: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, COSINE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``[rows]`` int32: the prototype with the largest similarity to each row; the lower index of equal ones.

    `tokens` points at row 0 of the tile, `prototypes` at a contiguous ``[clusters, DIM]``. Similarities are float32.
    """
    anchor = tl.arange(0, BLOCK_K)
    similarity = tl.zeros([rows.shape[0], BLOCK_K], tl.float32)
    square = tl.zeros([BLOCK_K], tl.float32)
    for first in range(0, DIM, BLOCK_C):
        column = first + tl.arange(0, BLOCK_C)
        inside = (column < DIM)[None, :]
        at = rows[:, None] * stride_n + column[None, :]
        token = tl.load(tokens + at, mask=valid[:, None] & inside, other=0.0).to(tl.float32)
        at = anchor[:, None] * DIM + column[None, :]
        prototype = tl.load(prototypes + at, mask=(anchor < clusters)[:, None] & inside, other=0.0).to(tl.float32)
        similarity = tl.dot(token, tl.trans(prototype), similarity, input_precision=PRECISION)
        if COSINE:
            square += tl.sum(prototype * prototype, 1)
    if COSINE:
        similarity = similarity / tl.maximum(tl.sqrt(square), NORM_FLOOR)[None, :]
    # A NaN is below all: compared with itself it would send an index past the last prototype, another in every thread.
    known = (anchor < clusters)[None, :] & (similarity == similarity)
    similarity = tl.where(known, similarity, -float("inf"))
    return tl.argmax(similarity, 1, tie_break_left=True).to(tl.int32)


def match_precision(dtype: str) -> str:
    """`input_precision` of the matching for a dtype class.

    A half-precision token is exact in TF32, so three TF32 products give the similarity to float32 rounding at matrix
    speed. Float32 tokens under IEEE rules take fused multiply-adds.
    """
    return "ieee" if dtype == "float32" else "tf32x3"


def padded_clusters(clusters: int) -> int:
    """`BLOCK_K` for a number of prototypes: a power of two that a matrix product takes."""
    return max(16, triton.next_power_of_2(clusters))
