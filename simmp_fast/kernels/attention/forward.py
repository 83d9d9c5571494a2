"""Forward: one program attends a tile of queries to all tokens of its image and to the slots of the clusters it holds.

The query tile stays on chip, keys and values (then slots) stream past it, tile by tile. In registers: the scores of
one tile, the row maxima and sums of the softmax at hand, and one float32 accumulator for the output. The memory
softmax is swept twice, first for its statistics, then for its weights, so that both softmaxes share that accumulator:
a second one would halve the tile at head dim 256. A cluster that no token of the tile belongs to is never looked at.
The output is written once; where a backward follows, so are one log-sum-exp a softmax and the context part in
float32, from which the backward takes exact row deltas. The context's log-sum-exp is kept as its two terms, maximum
and sum: at scores of 1e4 their rounded total would be off by 5e-4, and so would every weight that the backward
recomputes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..matching import CHUNK, nearest_prototype
from ..rounding import operand
from .tiles import exponential, load_again, load_rows, next_cluster, product, store_rows


@triton.jit
def _context_step(
    query_a, query_b, key, value, rows, stride_k, stride_v, valid, best, total, out_a, out_b,
    DIM: tl.constexpr, DIM_A: tl.constexpr, DIM_B: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One tile of keys and values through the online softmax."""
    key_a = load_rows(key, rows, stride_k, valid, 0, DIM_A, DIM, PRECISION, MASKED)
    key_b = key_a
    if DIM_B:
        key_b = load_rows(key, rows, stride_k, valid, DIM_A, DIM_B, DIM, PRECISION, MASKED)
    score = product(query_a, query_b, key_a, key_b, DIM_B, PRECISION, True)
    if MASKED:
        score = tl.where(valid[None, :], score, -float("inf"))
    higher = tl.maximum(best, tl.max(score, 1))
    weight = exponential(score - higher[:, None])
    shrink = exponential(best - higher)
    total = total * shrink + tl.sum(weight, 1)
    value_a = load_rows(value, rows, stride_v, valid, 0, DIM_A, DIM, PRECISION, MASKED)
    weight = operand(weight.to(value_a.dtype), PRECISION)
    out_a = tl.dot(weight, value_a, out_a * shrink[:, None], input_precision=PRECISION)
    if DIM_B:
        value_b = load_rows(value, rows, stride_v, valid, DIM_A, DIM_B, DIM, PRECISION, MASKED)
        out_b = tl.dot(weight, value_b, out_b * shrink[:, None], input_precision=PRECISION)
    return higher, total, out_a, out_b


@triton.jit
def _slot_tile(
    slots, first, count, query_a, query_b,
    DIM: tl.constexpr, DIM_A: tl.constexpr, DIM_B: tl.constexpr, BLOCK_S: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores of the queries with one tile of slots (minus infinity past the last), and the slots."""
    row = tl.arange(0, BLOCK_S)
    valid = first + row < count
    base = slots + first * DIM
    slot_a = load_rows(base, row, DIM, valid, 0, DIM_A, DIM, PRECISION, True)
    slot_b = slot_a
    if DIM_B:
        slot_b = load_rows(base, row, DIM, valid, DIM_A, DIM_B, DIM, PRECISION, True)
    score = product(query_a, query_b, slot_a, slot_b, DIM_B, PRECISION, True)
    return tl.where(valid[None, :], score, -float("inf")), slot_a, slot_b


@triton.jit(do_not_specialize=["tokens", "slots", "clusters"])
def attention_forward(
    query, key, value, memory, prototypes, cluster, out, context, context_lse, memory_lse,
    query_b, query_n, key_b, key_n, value_b, value_n, tokens, slots, clusters,
    DIM: tl.constexpr, DIM_A: tl.constexpr, DIM_B: tl.constexpr, BLOCK_K: tl.constexpr,
    CONTEXT: tl.constexpr, MEMORY: tl.constexpr, MATCH: tl.constexpr, SAVE: tl.constexpr, SAVE_CONTEXT: tl.constexpr,
    PRECISION: tl.constexpr, MATCH_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, HOIST: tl.constexpr,
):  # fmt: skip
    """Queries, keys, values ``[B, tokens, DIM]`` by stride; `memory`, `prototypes`, and all outputs contiguous."""
    tiles = tl.cdiv(tokens, BLOCK_M)
    image = (tl.program_id(0) // tiles).to(tl.int64)
    start = tl.program_id(0) % tiles * BLOCK_M
    row = tl.arange(0, BLOCK_M)
    valid = start + row < tokens
    query += image * query_b + start.to(tl.int64) * query_n
    first = image * tokens + start  # the tile's first row in the outputs
    if MEMORY:  # first, while no accumulator is alive
        if MATCH:
            owner = nearest_prototype(
                query, row, query_n, valid, prototypes, clusters, DIM, BLOCK_K, CHUNK, True, MATCH_PRECISION
            )
            tl.store(cluster + first + row, owner.to(tl.int64), mask=valid)
        else:
            owner = tl.load(cluster + first + row, mask=valid, other=0).to(tl.int32)
        owner = tl.where(valid, owner, clusters)
    q_a = load_rows(query, row, query_n, valid, 0, DIM_A, DIM, PRECISION, True)
    q_b = q_a
    if DIM_B:
        q_b = load_rows(query, row, query_n, valid, DIM_A, DIM_B, DIM, PRECISION, True)
    out_a = tl.zeros([BLOCK_M, DIM_A], tl.float32)
    out_b = out_a
    if DIM_B:
        out_b = tl.zeros([BLOCK_M, DIM_B], tl.float32)

    if CONTEXT:
        best = tl.full([BLOCK_M], -float("inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        column = tl.arange(0, BLOCK_N)
        key += image * key_b
        value += image * value_b
        whole = tokens // BLOCK_N * BLOCK_N
        for _step in tl.range(0, whole, BLOCK_N, disable_licm=not HOIST):
            best, total, out_a, out_b = _context_step(
                q_a, q_b, key, value, column, key_n, value_n, column < BLOCK_N, best, total, out_a, out_b,
                DIM, DIM_A, DIM_B, PRECISION, False,
            )  # fmt: skip
            key += BLOCK_N * key_n
            value += BLOCK_N * value_n
        q_a, q_b = load_again(q_a, q_b, query, row, query_n, valid, DIM, DIM_A, DIM_B, PRECISION)
        if whole < tokens:
            best, total, out_a, out_b = _context_step(
                q_a, q_b, key, value, column, key_n, value_n, whole + column < tokens, best, total, out_a, out_b,
                DIM, DIM_A, DIM_B, PRECISION, True,
            )  # fmt: skip
        out_a = out_a / total[:, None]
        if DIM_B:
            out_b = out_b / total[:, None]
        if SAVE:
            tl.store(context_lse + (first + row) * 2, best, mask=valid)
            tl.store(context_lse + (first + row) * 2 + 1, total, mask=valid)
        if SAVE_CONTEXT:
            store_rows(context + first * DIM, row, DIM, valid, out_a, 0, DIM_A, DIM)
            if DIM_B:
                store_rows(context + first * DIM, row, DIM, valid, out_b, DIM_A, DIM_B, DIM)

    if MEMORY:
        log_sum = tl.zeros([BLOCK_M], tl.float32)
        present = next_cluster(owner, -1, clusters)
        while present < clusters:
            bank = memory + present.to(tl.int64) * slots * DIM
            best = tl.full([BLOCK_M], -float("inf"), tl.float32)
            total = tl.zeros([BLOCK_M], tl.float32)
            for at in tl.range(0, slots, BLOCK_S, disable_licm=not HOIST):
                score, _, _ = _slot_tile(bank, at, slots, q_a, q_b, DIM, DIM_A, DIM_B, BLOCK_S, PRECISION)
                higher = tl.maximum(best, tl.max(score, 1))
                total = total * exponential(best - higher) + tl.sum(exponential(score - higher[:, None]), 1)
                best = higher
            member = owner == present
            log_sum = tl.where(member, best + tl.log(total), log_sum)
            inverse = tl.where(member, 1 / total, 0.0)
            for at in tl.range(0, slots, BLOCK_S, disable_licm=not HOIST):
                score, slot_a, slot_b = _slot_tile(bank, at, slots, q_a, q_b, DIM, DIM_A, DIM_B, BLOCK_S, PRECISION)
                weight = exponential(score - best[:, None]) * inverse[:, None]
                weight = operand(weight.to(slot_a.dtype), PRECISION)
                out_a = tl.dot(weight, slot_a, out_a, input_precision=PRECISION)
                if DIM_B:
                    out_b = tl.dot(weight, slot_b, out_b, input_precision=PRECISION)
            present = next_cluster(owner, present, clusters)
        if SAVE:
            tl.store(memory_lse + first + row, log_sum, mask=valid)

    store_rows(out + first * DIM, row, DIM, valid, out_a, 0, DIM_A, DIM)
    if DIM_B:
        store_rows(out + first * DIM, row, DIM, valid, out_b, DIM_A, DIM_B, DIM)
