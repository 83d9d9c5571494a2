"""Backward: scores are recomputed from the saved log-sum-exps; two kernels, each writing its rows once, no atomics.

`attention_backward_query` holds a tile of queries and output gradients. Half-precision inputs take the context's row
deltas from the saved float32 context (a rounded output would shift every delta). Float32 inputs sweep the keys once
more for them: there the deltas must cancel the very weights in use, or keys with a mean (6 is enough) show the
difference in dq. It writes the deltas for the other kernel, streams keys and values, and then sweeps the slots of the
clusters present twice: for the exact delta of the memory softmax, then for the gradient. Both parts meet in one
float32 accumulator. `attention_backward_key_value` holds a tile of keys and values and streams queries and output
gradients past it, with two accumulators. The memory is a constant and gets no gradient.

`HOIST` says whether what a loop does not change may be moved out of it: operands that wait in registers for the
tensor cores save time at head dims up to 128, and spill above.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..rounding import operand
from .tiles import exponential, load_again, load_rows, next_cluster, product, store_rows


@triton.jit
def _query_step(
    q_a, q_b, grad_a, grad_b, key, value, rows, stride_k, stride_v, valid, best, inverse, delta, dq_a, dq_b,
    DIM: tl.constexpr, DIM_A: tl.constexpr, DIM_B: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """What one tile of keys and values adds to the gradient of the queries."""
    key_a = load_rows(key, rows, stride_k, valid, 0, DIM_A, DIM, PRECISION, MASKED)
    value_a = load_rows(value, rows, stride_v, valid, 0, DIM_A, DIM, PRECISION, MASKED)
    key_b, value_b = key_a, value_a
    if DIM_B:
        key_b = load_rows(key, rows, stride_k, valid, DIM_A, DIM_B, DIM, PRECISION, MASKED)
        value_b = load_rows(value, rows, stride_v, valid, DIM_A, DIM_B, DIM, PRECISION, MASKED)
    score = product(q_a, q_b, key_a, key_b, DIM_B, PRECISION)
    weight = exponential(score - best[:, None]) * inverse[:, None]
    if MASKED:
        weight = tl.where(valid[None, :], weight, 0.0)
    slope = product(grad_a, grad_b, value_a, value_b, DIM_B, PRECISION)
    slope = operand((weight * (slope - delta[:, None])).to(key_a.dtype), PRECISION)
    dq_a = tl.dot(slope, key_a, dq_a, input_precision=PRECISION)
    if DIM_B:
        dq_b = tl.dot(slope, key_b, dq_b, input_precision=PRECISION)
    return dq_a, dq_b


@triton.jit
def _delta_step(
    q_a, q_b, grad_a, grad_b, key, value, rows, stride_k, stride_v, valid, best, mass, delta,
    DIM: tl.constexpr, DIM_A: tl.constexpr, DIM_B: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What one tile of keys and values adds to the weights' sum and to the row deltas, both before normalisation."""
    key_a = load_rows(key, rows, stride_k, valid, 0, DIM_A, DIM, PRECISION, True)
    value_a = load_rows(value, rows, stride_v, valid, 0, DIM_A, DIM, PRECISION, True)
    key_b, value_b = key_a, value_a
    if DIM_B:
        key_b = load_rows(key, rows, stride_k, valid, DIM_A, DIM_B, DIM, PRECISION, True)
        value_b = load_rows(value, rows, stride_v, valid, DIM_A, DIM_B, DIM, PRECISION, True)
    weight = exponential(product(q_a, q_b, key_a, key_b, DIM_B, PRECISION) - best[:, None])
    weight = tl.where(valid[None, :], weight, 0.0)
    slope = product(grad_a, grad_b, value_a, value_b, DIM_B, PRECISION)
    return mass + tl.sum(weight, 1), delta + tl.sum(weight * slope, 1)


@triton.jit
def _slot_weights(
    bank, first, count, q_a, q_b, grad_a, grad_b, log_sum, member,
    DIM: tl.constexpr, DIM_A: tl.constexpr, DIM_B: tl.constexpr, BLOCK_S: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Softmax weights of one tile of slots (0 outside the cluster), their gradients, and the slots."""
    row = tl.arange(0, BLOCK_S)
    valid = first + row < count
    base = bank + first * DIM
    slot_a = load_rows(base, row, DIM, valid, 0, DIM_A, DIM, PRECISION, True)
    slot_b = slot_a
    if DIM_B:
        slot_b = load_rows(base, row, DIM, valid, DIM_A, DIM_B, DIM, PRECISION, True)
    # Without tensor cores both products of a part come before the other part, so that it leaves the registers once.
    SINGLE: tl.constexpr = slot_a.dtype == tl.float32 and PRECISION == "ieee"
    if SINGLE:
        score = tl.dot(q_a, tl.trans(slot_a), input_precision=PRECISION)
        slope = tl.dot(grad_a, tl.trans(slot_a), input_precision=PRECISION)
        if DIM_B:
            score -= tl.dot(-q_b, tl.trans(slot_b), input_precision=PRECISION)  # apart, as the forward adds them up
            slope = tl.dot(grad_b, tl.trans(slot_b), slope, input_precision=PRECISION)
    else:
        score = product(q_a, q_b, slot_a, slot_b, DIM_B, PRECISION)
    inside = member[:, None] & valid[None, :]
    # A row of another cluster has no log-sum-exp here: its exponential may overflow before it is dropped.
    weight = tl.where(inside, exponential(score - log_sum[:, None]), 0.0)
    if not SINGLE:
        slope = product(grad_a, grad_b, slot_a, slot_b, DIM_B, PRECISION)
    return weight, slope, slot_a, slot_b


@triton.jit(do_not_specialize=["tokens", "slots", "clusters"])
def attention_backward_query(
    query, key, value, memory, cluster, grad, context, context_lse, memory_lse, delta, query_grad,
    query_b, query_n, key_b, key_n, value_b, value_n, grad_b, grad_n, tokens, slots, clusters,
    DIM: tl.constexpr, DIM_A: tl.constexpr, DIM_B: tl.constexpr,
    CONTEXT: tl.constexpr, MEMORY: tl.constexpr, RECOMPUTE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, HOIST: tl.constexpr,
):  # fmt: skip
    """Gradient of the queries, and the context's row deltas ``[B, tokens]``. Outputs are contiguous."""
    tiles = tl.cdiv(tokens, BLOCK_M)
    image = (tl.program_id(0) // tiles).to(tl.int64)
    start = tl.program_id(0) % tiles * BLOCK_M
    row = tl.arange(0, BLOCK_M)
    valid = start + row < tokens
    query += image * query_b + start.to(tl.int64) * query_n
    grad += image * grad_b + start.to(tl.int64) * grad_n
    first = image * tokens + start
    q_a = load_rows(query, row, query_n, valid, 0, DIM_A, DIM, PRECISION, True)
    g_a = load_rows(grad, row, grad_n, valid, 0, DIM_A, DIM, PRECISION, True)
    dq_a = tl.zeros([BLOCK_M, DIM_A], tl.float32)
    q_b, g_b, dq_b = q_a, g_a, dq_a
    if DIM_B:
        q_b = load_rows(query, row, query_n, valid, DIM_A, DIM_B, DIM, PRECISION, True)
        g_b = load_rows(grad, row, grad_n, valid, DIM_A, DIM_B, DIM, PRECISION, True)
        dq_b = tl.zeros([BLOCK_M, DIM_B], tl.float32)

    if CONTEXT:
        column = tl.arange(0, BLOCK_N)
        key += image * key_b
        value += image * value_b
        best = tl.load(context_lse + (first + row) * 2, mask=valid, other=0.0)
        if RECOMPUTE:
            mass = tl.zeros([BLOCK_M], tl.float32)
            row_delta = tl.zeros([BLOCK_M], tl.float32)
            key_at, value_at = key, value
            for at in tl.range(0, tokens, BLOCK_N, disable_licm=not HOIST):
                mass, row_delta = _delta_step(
                    q_a, q_b, g_a, g_b, key_at, value_at, column, key_n, value_n, at + column < tokens, best,
                    mass, row_delta, DIM, DIM_A, DIM_B, PRECISION,
                )  # fmt: skip
                key_at += BLOCK_N * key_n
                value_at += BLOCK_N * value_n
            inverse = 1 / mass
            row_delta *= inverse
        else:
            inverse = 1 / tl.load(context_lse + (first + row) * 2 + 1, mask=valid, other=1.0)
            context += first * DIM
            row_delta = tl.sum(g_a.to(tl.float32) * load_rows(context, row, DIM, valid, 0, DIM_A, DIM, "ieee", True), 1)
            if DIM_B:
                more = load_rows(context, row, DIM, valid, DIM_A, DIM_B, DIM, "ieee", True)
                row_delta += tl.sum(g_b.to(tl.float32) * more, 1)
        tl.store(delta + first + row, row_delta, mask=valid)
        whole = tokens // BLOCK_N * BLOCK_N
        for _step in tl.range(0, whole, BLOCK_N, disable_licm=not HOIST):
            dq_a, dq_b = _query_step(
                q_a, q_b, g_a, g_b, key, value, column, key_n, value_n, column < BLOCK_N, best, inverse,
                row_delta, dq_a, dq_b, DIM, DIM_A, DIM_B, PRECISION, False,
            )  # fmt: skip
            key += BLOCK_N * key_n
            value += BLOCK_N * value_n
        q_a, q_b = load_again(q_a, q_b, query, row, query_n, valid, DIM, DIM_A, DIM_B, PRECISION)
        g_a, g_b = load_again(g_a, g_b, grad, row, grad_n, valid, DIM, DIM_A, DIM_B, PRECISION)
        if whole < tokens:
            dq_a, dq_b = _query_step(
                q_a, q_b, g_a, g_b, key, value, column, key_n, value_n, whole + column < tokens, best, inverse,
                row_delta, dq_a, dq_b, DIM, DIM_A, DIM_B, PRECISION, True,
            )  # fmt: skip

    if MEMORY:
        owner = tl.load(cluster + first + row, mask=valid, other=0).to(tl.int32)
        owner = tl.where(valid, owner, clusters)
        log_sum = tl.load(memory_lse + first + row, mask=valid, other=0.0)
        present = next_cluster(owner, -1, clusters)
        while present < clusters:
            bank = memory + present.to(tl.int64) * slots * DIM
            member = owner == present
            row_delta = tl.zeros([BLOCK_M], tl.float32)
            mass = tl.zeros([BLOCK_M], tl.float32)
            for at in tl.range(0, slots, BLOCK_S, disable_licm=not HOIST):
                weight, slope, _, _ = _slot_weights(
                    bank, at, slots, q_a, q_b, g_a, g_b, log_sum, member, DIM, DIM_A, DIM_B, BLOCK_S, PRECISION
                )
                row_delta += tl.sum(weight * slope, 1)
                mass += tl.sum(weight, 1)
            # The weights sum to 1 only as far as the rounded log-sum-exp allows; divided by their sum they do.
            inverse = 1 / tl.where(member, mass, 1.0)
            row_delta *= inverse
            for at in tl.range(0, slots, BLOCK_S, disable_licm=not HOIST):
                weight, slope, slot_a, slot_b = _slot_weights(
                    bank, at, slots, q_a, q_b, g_a, g_b, log_sum, member, DIM, DIM_A, DIM_B, BLOCK_S, PRECISION
                )
                slope = weight * inverse[:, None] * (slope - row_delta[:, None])
                slope = operand(slope.to(slot_a.dtype), PRECISION)
                dq_a = tl.dot(slope, slot_a, dq_a, input_precision=PRECISION)
                if DIM_B:
                    dq_b = tl.dot(slope, slot_b, dq_b, input_precision=PRECISION)
            present = next_cluster(owner, present, clusters)

    store_rows(query_grad + first * DIM, row, DIM, valid, dq_a, 0, DIM_A, DIM)
    if DIM_B:
        store_rows(query_grad + first * DIM, row, DIM, valid, dq_b, DIM_A, DIM_B, DIM)


@triton.jit
def _key_value_step(
    key_a, key_b, value_a, value_b, query, grad, rows, stride_q, stride_g, valid, log_sums, deltas,
    dk_a, dk_b, dv_a, dv_b,
    DIM: tl.constexpr, DIM_A: tl.constexpr, DIM_B: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """What one tile of queries adds to the gradients of the keys and values."""
    q_a = load_rows(query, rows, stride_q, valid, 0, DIM_A, DIM, PRECISION, MASKED)
    g_a = load_rows(grad, rows, stride_g, valid, 0, DIM_A, DIM, PRECISION, MASKED)
    q_b, g_b = q_a, g_a
    if DIM_B:
        q_b = load_rows(query, rows, stride_q, valid, DIM_A, DIM_B, DIM, PRECISION, MASKED)
        g_b = load_rows(grad, rows, stride_g, valid, DIM_A, DIM_B, DIM, PRECISION, MASKED)
    if MASKED:
        best = tl.load(log_sums + rows * 2, mask=valid, other=0.0)
        total = tl.load(log_sums + rows * 2 + 1, mask=valid, other=1.0)
        delta = tl.load(deltas + rows, mask=valid, other=0.0)
    else:
        best = tl.load(log_sums + rows * 2)
        total = tl.load(log_sums + rows * 2 + 1)
        delta = tl.load(deltas + rows)
    # Keys by queries: both products below then take their left operand as it lies in registers.
    weight = exponential(product(key_a, key_b, q_a, q_b, DIM_B, PRECISION) - best[None, :]) * (1 / total)[None, :]
    if MASKED:
        weight = tl.where(valid[None, :], weight, 0.0)
    slope = product(value_a, value_b, g_a, g_b, DIM_B, PRECISION)
    slope = operand((weight * (slope - delta[None, :])).to(q_a.dtype), PRECISION)
    weight = operand(weight.to(g_a.dtype), PRECISION)
    dv_a = tl.dot(weight, g_a, dv_a, input_precision=PRECISION)
    dk_a = tl.dot(slope, q_a, dk_a, input_precision=PRECISION)
    if DIM_B:
        dv_b = tl.dot(weight, g_b, dv_b, input_precision=PRECISION)
        dk_b = tl.dot(slope, q_b, dk_b, input_precision=PRECISION)
    return dk_a, dk_b, dv_a, dv_b


@triton.jit(do_not_specialize=["tokens"])
def attention_backward_key_value(
    query, key, value, grad, context_lse, delta, key_grad, value_grad,
    query_b, query_n, key_b, key_n, value_b, value_n, grad_b, grad_n, tokens,
    DIM: tl.constexpr, DIM_A: tl.constexpr, DIM_B: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HOIST: tl.constexpr,
):  # fmt: skip
    """Gradients of the keys and values; BLOCK_N keys a program, BLOCK_M queries a step. Outputs are contiguous."""
    tiles = tl.cdiv(tokens, BLOCK_N)
    image = (tl.program_id(0) // tiles).to(tl.int64)
    start = tl.program_id(0) % tiles * BLOCK_N
    row = tl.arange(0, BLOCK_N)
    valid = start + row < tokens
    key += image * key_b + start.to(tl.int64) * key_n
    value += image * value_b + start.to(tl.int64) * value_n
    first = image * tokens + start
    k_a = load_rows(key, row, key_n, valid, 0, DIM_A, DIM, PRECISION, True)
    v_a = load_rows(value, row, value_n, valid, 0, DIM_A, DIM, PRECISION, True)
    dk_a = tl.zeros([BLOCK_N, DIM_A], tl.float32)
    dv_a = tl.zeros([BLOCK_N, DIM_A], tl.float32)
    k_b, v_b, dk_b, dv_b = k_a, v_a, dk_a, dv_a
    if DIM_B:
        k_b = load_rows(key, row, key_n, valid, DIM_A, DIM_B, DIM, PRECISION, True)
        v_b = load_rows(value, row, value_n, valid, DIM_A, DIM_B, DIM, PRECISION, True)
        dk_b = tl.zeros([BLOCK_N, DIM_B], tl.float32)
        dv_b = tl.zeros([BLOCK_N, DIM_B], tl.float32)
    query += image * query_b
    grad += image * grad_b
    context_lse += image * tokens * 2
    delta += image * tokens
    line = tl.arange(0, BLOCK_M)
    whole = tokens // BLOCK_M * BLOCK_M
    for at in tl.range(0, whole, BLOCK_M, disable_licm=not HOIST):
        dk_a, dk_b, dv_a, dv_b = _key_value_step(
            k_a, k_b, v_a, v_b, query, grad, line, query_n, grad_n, line < BLOCK_M, context_lse + at * 2, delta + at,
            dk_a, dk_b, dv_a, dv_b, DIM, DIM_A, DIM_B, PRECISION, False,
        )  # fmt: skip
        query += BLOCK_M * query_n
        grad += BLOCK_M * grad_n
    k_a, k_b = load_again(k_a, k_b, key, row, key_n, valid, DIM, DIM_A, DIM_B, PRECISION)
    v_a, v_b = load_again(v_a, v_b, value, row, value_n, valid, DIM, DIM_A, DIM_B, PRECISION)
    if whole < tokens:
        dk_a, dk_b, dv_a, dv_b = _key_value_step(
            k_a, k_b, v_a, v_b, query, grad, line, query_n, grad_n, whole + line < tokens, context_lse + whole * 2,
            delta + whole, dk_a, dk_b, dv_a, dv_b, DIM, DIM_A, DIM_B, PRECISION, True,
        )  # fmt: skip
    store_rows(key_grad + first * DIM, row, DIM, valid, dk_a, 0, DIM_A, DIM)
    store_rows(value_grad + first * DIM, row, DIM, valid, dv_a, 0, DIM_A, DIM)
    if DIM_B:
        store_rows(key_grad + first * DIM, row, DIM, valid, dk_b, DIM_A, DIM_B, DIM)
        store_rows(value_grad + first * DIM, row, DIM, valid, dv_b, DIM_A, DIM_B, DIM)
