"""Backward kernels of the split attention: one for the query, one for key and value. Both rebuild scores and weights.

With ``dP_ij = dz_i . value_j`` and the weights ``a`` of one of the two softmaxes, the gradient of a score that is in
its set and not 0 is ``a_ij (dP_ij - delta_i)``, ``delta_i = sum_j a_ij dP_ij`` over all j, the fill included. The query
kernel streams the keys twice: first for the exact deltas of both softmaxes (a delta taken from the rounded output
would be off by its rounding, and one output holds two softmaxes), which it also stores ``[2, B, N]``; then for the
gradient. The second kernel owns a block of keys and streams the queries; half of its programs write the value
gradient, half the key gradient, so that one accumulator at a time is in registers. Every result is written by one
program in a fixed order: no atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..rounding import operand
from ..tuples import append, zero_tiles
from .tiles import (
    FILL,
    both_sets,
    dot_tile,
    load_chunk,
    score_gradient,
    softmax_weights,
    store_chunk,
    token_pointers,
)


@triton.jit
def _row_statistics(statistics, place, valid, plane):
    """``far_max, 1 / far_sum, near_max, 1 / near_sum`` of some rows."""
    row = statistics + place
    far_max = tl.load(row, mask=valid, other=0.0)
    row += plane
    far_sum = tl.load(row, mask=valid, other=1.0)
    row += plane
    near_max = tl.load(row, mask=valid, other=0.0)
    row += plane
    near_sum = tl.load(row, mask=valid, other=1.0)
    return far_max, 1.0 / far_sum, near_max, 1.0 / near_sum


@triton.jit(do_not_specialize=["n", "plane"])
def split_attention_query_backward(
    query, key, value, row_mean, threshold, statistics, upstream, query_gradient, deltas, n, plane,
    query_b, query_n, key_b, key_n, value_b, value_n, upstream_b, upstream_n,
    CHANNELS: tl.constexpr, RELEASED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(n, BLOCK_M)
    image = tl.program_id(0) // blocks
    rows = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    group = tl.program_id(1)
    row_valid = rows < n
    place = image.to(tl.int64) * n + rows
    far_max, far_inverse, near_max, near_inverse = _row_statistics(statistics, place, row_valid, plane)
    mean = tl.load(row_mean + image.to(tl.int64) * n + rows, mask=row_valid, other=0.0)[:, None]
    limit = tl.load(threshold + image.to(tl.int64) * n + rows, mask=row_valid, other=0.0)
    queries = token_pointers(query, image, rows, query_b, query_n)
    upstreams = token_pointers(upstream, image, rows, upstream_b, upstream_n)

    far_delta = tl.zeros([BLOCK_M], tl.float32)
    near_delta = tl.zeros([BLOCK_M], tl.float32)
    accumulators = zero_tiles(GROUP, BLOCK_M, BLOCK_C)
    # Two sweeps over the keys: the deltas, then the gradient.
    for sweep in tl.static_range(2):
        for start in range(0, n, BLOCK_N):
            columns = start + tl.arange(0, BLOCK_N)
            valid = columns < n
            both = row_valid[:, None] & valid[None, :]
            keys = token_pointers(key, image, columns, key_b, key_n)
            values = token_pointers(value, image, columns, value_b, value_n)
            raw = dot_tile(queries, row_valid, keys, valid, BLOCK_M, BLOCK_N, CHANNELS, BLOCK_K, PRECISION)
            scores = tl.where(raw == 0, FILL, raw)
            key_mean = tl.load(row_mean + image.to(tl.int64) * n + columns, mask=valid, other=0.0)
            diagonal = rows[:, None] == columns[None, :]
            far, near = both_sets(mean, key_mean[None, :], limit[:, None], diagonal, both, RELEASED)
            in_far, in_near = softmax_weights(
                scores, far, near, both, far_max[:, None], far_inverse[:, None], near_max[:, None],
                near_inverse[:, None], RELEASED,
            )  # fmt: skip
            inner = dot_tile(upstreams, row_valid, values, valid, BLOCK_M, BLOCK_N, CHANNELS, BLOCK_K, PRECISION)
            if sweep == 0:
                far_delta += tl.sum(in_far * inner, 1)
                near_delta += tl.sum(in_near * inner, 1)
            else:
                gradient = score_gradient(
                    raw, far, near, in_far, in_near, inner, far_delta[:, None], near_delta[:, None]
                )
                gradient = operand(gradient.to(key.dtype.element_ty), PRECISION)
                updated = ()
                for i in tl.static_range(GROUP):
                    k = load_chunk(keys, valid, group * GROUP + i, CHANNELS, BLOCK_C, PRECISION, GROUP)
                    updated = append(updated, tl.dot(gradient, k, accumulators[i], input_precision=PRECISION))
                accumulators = updated

    if group == 0:
        tl.store(deltas + place, far_delta, mask=row_valid)
        tl.store(deltas + place + plane, near_delta, mask=row_valid)
    for i in tl.static_range(GROUP):
        store_chunk(query_gradient + place * CHANNELS, row_valid, group * GROUP + i, accumulators[i], CHANNELS, BLOCK_C)


@triton.jit
def _key_side(
    output, query, key, value, row_mean, threshold, statistics, upstream, deltas, n, plane,
    query_b, query_n, key_b, key_n, value_b, value_n, upstream_b, upstream_n,
    FOR_VALUE: tl.constexpr, CHANNELS: tl.constexpr, RELEASED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The gradient of `BLOCK_N` keys, or of their values, from all queries of the image, `BLOCK_M` at a time.

    Tiles stay queries by keys and are transposed late: a score then rounds exactly as in the forward, and a weight near
    1 keeps all its digits where scores are large.
    """
    blocks = tl.cdiv(n, BLOCK_N)
    image = tl.program_id(0) // blocks
    columns = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    group = tl.program_id(1)
    valid = columns < n
    keys = token_pointers(key, image, columns, key_b, key_n)
    values = token_pointers(value, image, columns, value_b, value_n)
    key_mean = tl.load(row_mean + image.to(tl.int64) * n + columns, mask=valid, other=0.0)[None, :]
    accumulators = zero_tiles(GROUP, BLOCK_N, BLOCK_C)
    for start in range(0, n, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        row_valid = rows < n
        both = row_valid[:, None] & valid[None, :]
        place = image.to(tl.int64) * n + rows
        far_max, far_inverse, near_max, near_inverse = _row_statistics(statistics, place, row_valid, plane)
        mean = tl.load(row_mean + image.to(tl.int64) * n + rows, mask=row_valid, other=0.0)
        limit = tl.load(threshold + image.to(tl.int64) * n + rows, mask=row_valid, other=0.0)
        queries = token_pointers(query, image, rows, query_b, query_n)
        upstreams = token_pointers(upstream, image, rows, upstream_b, upstream_n)
        raw = dot_tile(queries, row_valid, keys, valid, BLOCK_M, BLOCK_N, CHANNELS, BLOCK_K, PRECISION)
        scores = tl.where(raw == 0, FILL, raw)
        diagonal = rows[:, None] == columns[None, :]
        far, near = both_sets(mean[:, None], key_mean, limit[:, None], diagonal, both, RELEASED)
        in_far, in_near = softmax_weights(
            scores, far, near, both, far_max[:, None], far_inverse[:, None], near_max[:, None], near_inverse[:, None],
            RELEASED,
        )  # fmt: skip
        if FOR_VALUE:
            factor = in_far + in_near
            partner = upstreams
        else:
            inner = dot_tile(upstreams, row_valid, values, valid, BLOCK_M, BLOCK_N, CHANNELS, BLOCK_K, PRECISION)
            far_delta = tl.load(deltas + place, mask=row_valid, other=0.0)[:, None]
            near_delta = tl.load(deltas + place + plane, mask=row_valid, other=0.0)[:, None]
            factor = score_gradient(raw, far, near, in_far, in_near, inner, far_delta, near_delta)
            partner = queries
        factor = tl.trans(operand(factor.to(query.dtype.element_ty), PRECISION))
        updated = ()
        for i in tl.static_range(GROUP):
            chunk = load_chunk(partner, row_valid, group * GROUP + i, CHANNELS, BLOCK_C, PRECISION, GROUP)
            updated = append(updated, tl.dot(factor, chunk, accumulators[i], input_precision=PRECISION))
        accumulators = updated

    place = output + (image.to(tl.int64) * n + columns) * CHANNELS
    for i in tl.static_range(GROUP):
        store_chunk(place, valid, group * GROUP + i, accumulators[i], CHANNELS, BLOCK_C)


@triton.jit(do_not_specialize=["n", "plane"])
def split_attention_key_value_backward(
    query, key, value, row_mean, threshold, statistics, upstream, deltas, key_gradient, value_gradient, n, plane,
    query_b, query_n, key_b, key_n, value_b, value_n, upstream_b, upstream_n,
    CHANNELS: tl.constexpr, RELEASED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    if tl.program_id(2) == 0:
        _key_side(
            key_gradient, query, key, value, row_mean, threshold, statistics, upstream, deltas, n, plane,
            query_b, query_n, key_b, key_n, value_b, value_n, upstream_b, upstream_n,
            False, CHANNELS, RELEASED, PRECISION, BLOCK_M, BLOCK_N, BLOCK_C, BLOCK_K, GROUP,
        )  # fmt: skip
    else:
        _key_side(
            value_gradient, query, key, value, row_mean, threshold, statistics, upstream, deltas, n, plane,
            query_b, query_n, key_b, key_n, value_b, value_n, upstream_b, upstream_n,
            True, CHANNELS, RELEASED, PRECISION, BLOCK_M, BLOCK_N, BLOCK_C, BLOCK_K, GROUP,
        )  # fmt: skip
