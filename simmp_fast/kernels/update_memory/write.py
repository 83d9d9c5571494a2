"""The write: one program a cluster picks its tokens and slots, pairs them and writes slots and prototype.

Few bytes and no parallelism to speak of: the tokens' scores of one cluster are scanned five times from the cache
(four radix digits of the k-th largest score, then the choice), everything else is of the size of the cluster's
slots. Orders come from counting how many entries precede each, so ties fall to the lower index by construction and
nothing is sorted. Numbers that one thread writes and another reads pass through global scratch of this program
alone, with a barrier between.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..attention.tiles import exponential


@triton.jit
def _order(score):
    """Bits of scores, which are never negative, in their order; a NaN of any sign is above all and equals its like.

    As numbers, NaNs come neither before nor after anything: they would share a rank and leave other ranks to nobody.
    """
    return score.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _softmax_mass(value, valid, repeats):
    """``[rows]``: softmax over the rows of a chunk of channels (row i counts repeats_i times), summed over channels."""
    level = tl.max(tl.where(valid, value, -float("inf")), 0)
    level = tl.where(level == -float("inf"), 0.0, level)
    weight = tl.where(valid, exponential(value - level[None, :]), 0.0)
    mass = tl.sum(weight * repeats[:, None], 0)
    return tl.sum(weight / tl.where(mass > 0, mass, 1.0)[None, :], 1)


@triton.jit
def _kth_largest(score, count, width, BLOCK_N: tl.constexpr):
    """Bits of the `width`-th largest of `count` non-negative scores, and how many entries equal to it are taken."""
    digit = tl.arange(0, 256)
    prefix = tl.full([], 0, tl.int32)
    left = width
    for step in range(4):
        shift = 24 - 8 * step
        histogram = tl.zeros([256], tl.int32)
        for at in range(0, count, BLOCK_N):
            line = at + tl.arange(0, BLOCK_N)
            bits = _order(tl.load(score + line, mask=line < count, other=0.0))
            # Two shifts: one by 32 would be undefined for the first digit.
            inside = (line < count) & (((bits >> shift) >> 8) == prefix)
            histogram += tl.histogram(tl.where(inside, (bits >> shift) & 255, 0), 256)
            # Entries outside were counted as digit 0.
            histogram -= tl.where(digit == 0, BLOCK_N - tl.sum(inside.to(tl.int32), 0), 0)
        larger = tl.sum(histogram, 0) - tl.cumsum(histogram, 0)
        here = (larger < left) & (larger + histogram >= left)
        prefix = (prefix << 8) | tl.sum(tl.where(here, digit, 0), 0)
        left -= tl.sum(tl.where(here, larger, 0), 0)
    return prefix, left


@triton.jit
def _rank(own, own_place, others, count, LARGEST: tl.constexpr, BLOCK_J: tl.constexpr):
    """How many of `count` entries at `others` come before each of `own`: the better, and of equal ones the earlier."""
    rank = tl.zeros([own.shape[0]], tl.int32)
    own = _order(own)
    for at in range(0, count, BLOCK_J):
        line = at + tl.arange(0, BLOCK_J)
        other = _order(tl.load(others + line, mask=line < count, other=0.0))
        better = (other[None, :] > own[:, None]) if LARGEST else (other[None, :] < own[:, None])
        earlier = (other[None, :] == own[:, None]) & (line[None, :] < own_place[:, None])
        rank += tl.sum(((better | earlier) & (line < count)[None, :]).to(tl.int32), 1)
    return rank


@triton.jit(do_not_specialize=["width", "slots", "clusters", "length"])
def write_slots(
    tokens, memory, members, score, index, width_tensor, new_memory, new_prototypes, value_scratch, index_scratch,
    width, rate, stride_b, stride_n, length, slots, clusters,
    DIM: tl.constexpr, BLOCK_K: tl.constexpr, WIDTH_ON_DEVICE: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """New slots and prototype of cluster ``program_id(0)``; BLOCK_S holds all its slots.

    value_scratch ``[clusters, 2, BLOCK_S]`` float32 and index_scratch ``[clusters, 2, BLOCK_S]`` int64 hold the chosen
    tokens and their order.
    """
    cluster = tl.program_id(0)
    if WIDTH_ON_DEVICE:
        width = tl.load(width_tensor).to(tl.int64)
        width = tl.minimum(tl.maximum(width, 1), slots).to(tl.int32)
    anchor = tl.arange(0, BLOCK_K)
    size = tl.load(members + anchor, mask=anchor < clusters, other=0)
    count = tl.sum(tl.where(anchor == cluster, size, 0), 0)
    offset = tl.sum(tl.where(anchor < cluster, size, 0), 0)
    score += offset
    index += offset
    slot = tl.arange(0, BLOCK_S)
    bank = memory + cluster.to(tl.int64) * slots * DIM
    slot_score = value_scratch + cluster * 2 * BLOCK_S
    token_score = slot_score + BLOCK_S
    chosen = index_scratch + cluster * 2 * BLOCK_S
    ordered = chosen + BLOCK_S

    inside = slot < slots
    ones = tl.full([BLOCK_S], 1.0, tl.float32)
    result = tl.zeros([BLOCK_S], tl.float32)
    for at in range(0, DIM, BLOCK_C):
        column = at + tl.arange(0, BLOCK_C)
        mask = inside[:, None] & (column < DIM)[None, :]
        value = tl.load(bank + slot[:, None] * DIM + column[None, :], mask=mask, other=0.0).to(tl.float32)
        result += _softmax_mass(value, mask, ones)
    tl.store(slot_score + slot, result, mask=inside)

    # The tokens to write, in token order. Fewer than `width`: all of them, and their scores afresh, because a token
    # that is repeated counts as often in the softmax.
    if count >= width:
        threshold, equal = _kth_largest(score, count, width, BLOCK_N)
        taken = tl.full([], 0, tl.int32)
        ties = tl.full([], 0, tl.int32)
        for at in range(0, count, BLOCK_N):
            line = at + tl.arange(0, BLOCK_N)
            value = tl.load(score + line, mask=line < count, other=0.0)
            bits = _order(value)
            tie = (line < count) & (bits == threshold)
            take = (line < count) & ((bits > threshold) | (tie & (ties + tl.cumsum(tie.to(tl.int32), 0) <= equal)))
            place = taken + tl.cumsum(take.to(tl.int32), 0) - 1
            tl.store(chosen + place, tl.load(index + line, mask=take, other=0), mask=take)
            tl.store(token_score + place, value, mask=take)
            taken += tl.sum(take.to(tl.int32), 0)
            ties += tl.sum(tie.to(tl.int32), 0)
    elif count > 0:
        inside = slot < count
        which = tl.load(index + slot, mask=inside, other=0)
        source = tokens + (which // length) * stride_b + (which % length) * stride_n
        repeats = (width // count + (slot < width % count).to(tl.int32)).to(tl.float32)
        result = tl.zeros([BLOCK_S], tl.float32)
        for at in range(0, DIM, BLOCK_C):
            column = at + tl.arange(0, BLOCK_C)
            mask = inside[:, None] & (column < DIM)[None, :]
            value = tl.load(source[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
            result += _softmax_mass(value, mask, repeats)
        tl.debug_barrier()
        tl.store(chosen + slot, which, mask=inside)
        tl.store(token_score + slot, result, mask=inside)
        tl.debug_barrier()
        cycle = slot % count
        which = tl.load(chosen + cycle, mask=slot < width, other=0)
        result = tl.load(token_score + cycle, mask=slot < width, other=0.0)
        tl.debug_barrier()
        tl.store(chosen + slot, which, mask=slot < width)
        tl.store(token_score + slot, result, mask=slot < width)
    tl.debug_barrier()

    inside = slot < slots
    slot_rank = _rank(tl.load(slot_score + slot, mask=inside, other=0.0), slot, slot_score, slots, False, BLOCK_J)
    if count > 0:
        picked = slot < width
        value = tl.load(token_score + slot, mask=picked, other=0.0)
        token_rank = _rank(value, slot, token_score, width, True, BLOCK_J)
        tl.store(ordered + token_rank, tl.load(chosen + slot, mask=picked, other=0), mask=picked)
    tl.debug_barrier()
    written = inside & (slot_rank < tl.where(count > 0, width, 0))
    which = tl.load(ordered + slot_rank, mask=written, other=0)
    source = tokens + (which // length) * stride_b + (which % length) * stride_n
    for at in range(0, DIM, BLOCK_C):
        column = at + tl.arange(0, BLOCK_C)
        mask = inside[:, None] & (column < DIM)[None, :]
        place = slot[:, None] * DIM + column[None, :]
        old = tl.load(bank + place, mask=mask, other=0.0).to(tl.float32)
        token = tl.load(source[:, None] + column[None, :], mask=mask & written[:, None], other=0.0).to(tl.float32)
        new = tl.where(written[:, None], (1 - rate) * old + rate * token, old)
        tl.store(
            new_memory + cluster.to(tl.int64) * slots * DIM + place, new.to(new_memory.dtype.element_ty), mask=mask
        )
        mean = tl.sum(new, 0) / slots
        row = new_prototypes + cluster.to(tl.int64) * DIM + column
        tl.store(row, mean.to(new_prototypes.dtype.element_ty), mask=column < DIM)
