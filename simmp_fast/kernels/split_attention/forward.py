"""Forward kernel of the split attention (sections 5.4, 5.5).

A program owns `BLOCK_M` queries of one image and `GROUP` chunks of `BLOCK_C` output channels. It streams the keys
twice: first for the maximum and the sum of each softmax, then for the output, so that the weights of both softmaxes are
added before the one product with the values: one accumulator in registers where a single sweep would need two, for the
same number of operations (two products with the keys and one with the values, against one and two). 384 channels are
three chunks of 128, none padded. The statistics ``[4, B, N]`` (far maximum, far sum, near maximum, near sum) are
written once, by the first channel group.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..rounding import operand
from ..tuples import append, zero_tiles
from .tiles import FILL, both_sets, dot_tile, exponentials, load_chunk, softmax_weights, store_chunk, token_pointers


@triton.jit
def _add_fill(maximum, total, outside):
    """The maximum and the sum of a softmax once the `outside` elements at the fill have joined."""
    joined = tl.where(outside > 0, tl.maximum(maximum, FILL), maximum)
    fill = tl.where(outside > 0, outside * tl.exp(-joined + FILL), 0.0)
    return joined, total * tl.exp(maximum - joined) + fill


@triton.jit(do_not_specialize=["n", "plane"])
def split_attention_forward(
    query, key, value, row_mean, threshold, output, statistics, n, plane,
    query_b, query_n, key_b, key_n, value_b, value_n,
    CHANNELS: tl.constexpr, RELEASED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(n, BLOCK_M)
    image = tl.program_id(0) // blocks
    rows = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    group = tl.program_id(1)
    row_valid = rows < n
    queries = token_pointers(query, image, rows, query_b, query_n)
    mean = tl.load(row_mean + image.to(tl.int64) * n + rows, mask=row_valid, other=0.0)[:, None]
    limit = tl.load(threshold + image.to(tl.int64) * n + rows, mask=row_valid, other=0.0)
    limit = limit[:, None]

    # A finite start keeps an empty set free of inf - inf.
    far_max = tl.full([BLOCK_M], -3.0e38, tl.float32)
    near_max = tl.full([BLOCK_M], -3.0e38, tl.float32)
    far_sum = tl.zeros([BLOCK_M], tl.float32)
    near_sum = tl.zeros([BLOCK_M], tl.float32)
    far_count = tl.zeros([BLOCK_M], tl.int32)
    near_count = tl.zeros([BLOCK_M], tl.int32)
    for start in range(0, n, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        valid = columns < n
        keys = token_pointers(key, image, columns, key_b, key_n)
        scores = dot_tile(queries, row_valid, keys, valid, BLOCK_M, BLOCK_N, CHANNELS, BLOCK_K, PRECISION)
        scores = tl.where(scores == 0, FILL, scores)
        key_mean = tl.load(row_mean + image.to(tl.int64) * n + columns, mask=valid, other=0.0)[None, :]
        diagonal = rows[:, None] == columns[None, :]
        far, near = both_sets(mean, key_mean, limit, diagonal, row_valid[:, None] & valid[None, :], RELEASED)
        far_next = tl.maximum(far_max, tl.max(tl.where(far, scores, float("-inf")), 1))
        near_next = tl.maximum(near_max, tl.max(tl.where(near, scores, float("-inf")), 1))
        of_far, of_near = exponentials(scores, far, near, far_next[:, None], near_next[:, None], RELEASED)
        far_sum = far_sum * tl.exp(far_max - far_next) + tl.sum(of_far, 1)
        near_sum = near_sum * tl.exp(near_max - near_next) + tl.sum(of_near, 1)
        far_count += tl.sum(far.to(tl.int32), 1)
        near_count += tl.sum(near.to(tl.int32), 1)
        far_max = far_next
        near_max = near_next
    far_max, far_sum = _add_fill(far_max, far_sum, n - far_count)
    near_max, near_sum = _add_fill(near_max, near_sum, n - near_count)

    if group == 0:
        place = statistics + image.to(tl.int64) * n + rows
        tl.store(place, far_max, mask=row_valid)
        place += plane
        tl.store(place, far_sum, mask=row_valid)
        place += plane
        tl.store(place, near_max, mask=row_valid)
        place += plane
        tl.store(place, near_sum, mask=row_valid)

    far_inverse = (1.0 / far_sum)[:, None]
    near_inverse = (1.0 / near_sum)[:, None]
    accumulators = zero_tiles(GROUP, BLOCK_M, BLOCK_C)
    for start in range(0, n, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        valid = columns < n
        keys = token_pointers(key, image, columns, key_b, key_n)
        scores = dot_tile(queries, row_valid, keys, valid, BLOCK_M, BLOCK_N, CHANNELS, BLOCK_K, PRECISION)
        scores = tl.where(scores == 0, FILL, scores)
        key_mean = tl.load(row_mean + image.to(tl.int64) * n + columns, mask=valid, other=0.0)[None, :]
        diagonal = rows[:, None] == columns[None, :]
        both = row_valid[:, None] & valid[None, :]
        far, near = both_sets(mean, key_mean, limit, diagonal, both, RELEASED)
        in_far, in_near = softmax_weights(
            scores, far, near, both, far_max[:, None], far_inverse, near_max[:, None], near_inverse, RELEASED
        )
        weights = operand((in_far + in_near).to(value.dtype.element_ty), PRECISION)
        values = token_pointers(value, image, columns, value_b, value_n)
        updated = ()
        for i in tl.static_range(GROUP):
            v = load_chunk(values, valid, group * GROUP + i, CHANNELS, BLOCK_C, PRECISION, GROUP)
            updated = append(updated, tl.dot(weights, v, accumulators[i], input_precision=PRECISION))
        accumulators = updated

    place = output + (image.to(tl.int64) * n + rows) * CHANNELS
    for i in tl.static_range(GROUP):
        store_chunk(place, row_valid, group * GROUP + i, accumulators[i], CHANNELS, BLOCK_C)
