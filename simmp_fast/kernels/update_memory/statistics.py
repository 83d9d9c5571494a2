"""The two passes over the tokens: assignment with per-cluster softmax statistics, then token scores.

The first pass reads a tile of tokens, finds their clusters and, for each cluster that occurs in the tile, writes
the maximum and the sum of exponentials of every channel: nothing of size ``[T, K, D]``, and the partial sums of a
cluster that does not occur are neither written nor read. A short kernel folds the partials in tile order, so the
result never depends on timing. The second pass scores every token and writes score and index to the token's place
in its cluster's list, whose offset and order follow from counts: the lists are in token order without a sort.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..attention.tiles import exponential, next_cluster
from ..matching import nearest_prototype


@triton.jit
def _channels(tokens, row, stride_n, valid, column, DIM: tl.constexpr):
    """``[rows, columns]`` float32: some channels of a tile of tokens."""
    mask = valid[:, None] & (column < DIM)[None, :]
    return tl.load(tokens + row[:, None] * stride_n + column[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["length", "clusters"])
def assign_and_measure(
    tokens, prototypes, cluster, owner, count, peak, mass, stride_b, stride_n, length, clusters,
    DIM: tl.constexpr, BLOCK_K: tl.constexpr, MATCH: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Pass one. A program takes BLOCK_T tokens of one image and is the only writer of its rows.

    Writes owner ``[B, length]`` int32, count ``[tiles, clusters]`` int32, and for the clusters that occur peak and mass
    ``[tiles, clusters, DIM]``: the maximum of a channel and the sum of exponentials below it.
    """
    tile = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(length, BLOCK_T)
    image = tile // tiles
    start = (tl.program_id(0) % tiles) * BLOCK_T
    row = tl.arange(0, BLOCK_T)
    valid = start + row < length
    tokens += image * stride_b + start.to(tl.int64) * stride_n
    first = image * length + start
    if MATCH:
        found = nearest_prototype(
            tokens, row, stride_n, valid, prototypes, clusters, DIM, BLOCK_K, BLOCK_C, False, PRECISION
        )
    else:
        found = tl.load(cluster + first + row, mask=valid, other=0).to(tl.int32)
    tl.store(owner + first + row, found, mask=valid)
    found = tl.where(valid, found, clusters)
    anchor = tl.arange(0, BLOCK_K)
    occurs = tl.sum((found[:, None] == anchor[None, :]).to(tl.int32), 0)
    tl.store(count + tile * clusters + anchor, occurs, mask=anchor < clusters)

    # A few channels at a time: all of them would take the registers of the other programs of a multiprocessor.
    for from_channel in range(0, DIM, BLOCK_D):
        column = from_channel + tl.arange(0, BLOCK_D)
        value = _channels(tokens, row, stride_n, valid, column, DIM)
        present = next_cluster(found, -1, clusters)
        while present < clusters:
            member = (found == present)[:, None]
            highest = tl.max(tl.where(member, value, -float("inf")), 0)
            total = tl.sum(tl.where(member, exponential(value - highest[None, :]), 0.0), 0)
            at = (tile * clusters + present) * DIM + column
            tl.store(peak + at, highest, mask=column < DIM)
            tl.store(mass + at, total, mask=column < DIM)
            present = next_cluster(found, present, clusters)


@triton.jit(do_not_specialize=["tiles", "clusters"])
def fold_statistics(
    count, peak, mass, before, members, highest, total, tiles, clusters,
    DIM: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Fold the partials of one cluster and one chunk of channels, in tile order.

    Writes highest and total ``[clusters, DIM]``; the programs of the first chunk also write members ``[clusters]`` and
    before ``[tiles, clusters]``: how many tokens of the cluster lie in earlier tiles.
    """
    cluster = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    line = tl.arange(0, BLOCK_P)
    best = tl.full([BLOCK_C], -float("inf"), tl.float32)
    summed = tl.zeros([BLOCK_C], tl.float32)
    seen = tl.full([], 0, tl.int32)
    for at in range(0, tiles, BLOCK_P):
        tile = (at + line).to(tl.int64)
        valid = tile < tiles
        here = tl.load(count + tile * clusters + cluster, mask=valid, other=0)
        if tl.program_id(1) == 0:
            tl.store(before + tile * clusters + cluster, seen + tl.cumsum(here, 0) - here, mask=valid)
        seen += tl.sum(here, 0)
        mask = (here > 0)[:, None] & (column < DIM)[None, :]
        offset = (tile * clusters + cluster)[:, None] * DIM + column[None, :]
        part = tl.load(peak + offset, mask=mask, other=-float("inf"))
        higher = tl.maximum(best, tl.max(part, 0))
        level = tl.where(higher == -float("inf"), 0.0, higher)  # no token so far: exp(-inf - 0) is 0
        weight = tl.load(mass + offset, mask=mask, other=0.0) * exponential(part - level[None, :])
        summed = summed * exponential(best - level) + tl.sum(weight, 0)
        best = higher
    at = cluster.to(tl.int64) * DIM + column
    tl.store(highest + at, best, mask=column < DIM)
    tl.store(total + at, summed, mask=column < DIM)
    if tl.program_id(1) == 0:
        tl.store(members + cluster, seen)


@triton.jit(do_not_specialize=["length", "clusters"])
def score_tokens(
    tokens, owner, before, members, highest, total, score, index, stride_b, stride_n, length, clusters,
    DIM: tl.constexpr, PADDED: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Pass two. Score of every token, ``sum_d exp(token_d - highest_d) / total_d``, and its index, in cluster order.

    score float32 and index int64 are ``[T]``: the tokens of cluster 0 in token order, then those of cluster 1, ...
    """
    tile = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(length, BLOCK_T)
    image = tile // tiles
    start = (tl.program_id(0) % tiles) * BLOCK_T
    row = tl.arange(0, BLOCK_T)
    valid = start + row < length
    first = image * length + start
    found = tl.load(owner + first + row, mask=valid, other=0)
    valid = valid & (found >= 0) & (found < clusters)
    column = tl.arange(0, PADDED)
    value = _channels(tokens + image * stride_b + start.to(tl.int64) * stride_n, row, stride_n, valid, column, DIM)
    at = found.to(tl.int64)[:, None] * DIM + column[None, :]
    mask = valid[:, None] & (column < DIM)[None, :]
    level = tl.load(highest + at, mask=mask, other=0.0)
    mass = tl.load(total + at, mask=mask, other=1.0)
    result = tl.sum(tl.where(mask, exponential(value - level) / mass, 0.0), 1)

    anchor = tl.arange(0, BLOCK_K)
    size = tl.load(members + anchor, mask=anchor < clusters, other=0)
    base = tl.cumsum(size, 0) - size + tl.load(before + tile * clusters + anchor, mask=anchor < clusters, other=0)
    chosen = valid[:, None] & (found[:, None] == anchor[None, :])
    place = base[None, :] + tl.cumsum(chosen.to(tl.int32), 0) - 1
    place = tl.sum(tl.where(chosen, place, 0), 1)
    tl.store(score + place, result, mask=valid)
    tl.store(index + place, first + row, mask=valid)
