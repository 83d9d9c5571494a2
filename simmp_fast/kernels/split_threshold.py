"""`split_threshold`: row means without scores, thresholds without distances (section 5.4).

``r_i = query_i . mean_j key_j`` needs no score matrix. In rank order of r the ``N - rank + 1`` rows nearest to i are a
window of neighbours, so ``t_i`` is the least, over the `rank` windows, of the distance to a window's farther end. The
distance to the left end falls as the window moves right and the other rises, also once rounded: a binary search finds
where they cross, and ``t_i`` is one of the computed ``|r_i - r_j|`` to the last bit.

Up to `ONE_LAUNCH` tokens one program an image does it all with the row means in registers: one launch, query and key
read once. Longer sequences take a launch for the mean keys, one for the row means, PyTorch's sort, and one for the
search; memory is linear in N.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import limits
from ..validation import check_split_threshold
from .aot import POINTERS, Signature, register_kernel
from .configs import Config, pick, register_table
from .launch import check_launchable, launch, rows_contiguous
from .register import flops, operator

# Width is the number of tokens a program holds, or, for the kernels of long sequences, any.
# kernel                 dtype width capabilities tiles                 warps stages shared_KiB stack provenance
register_table("""
split_threshold_image    any   256    all         BLOCK_C=32            8     1      48         0     ahead-of-time
split_threshold_image    any   1024   all         BLOCK_C=16            16    1      48         0     ahead-of-time
split_threshold_centre   any   1      all         BLOCK_N=64,BLOCK_C=64 4     1      48         0     ahead-of-time
split_threshold_rows     any   1      all         BLOCK_N=32,BLOCK_C=64 4     1      48         0     ahead-of-time
split_threshold_search   any   1      all         BLOCK_N=256           4     1      48         0     ahead-of-time
""")
ONE_LAUNCH = 1024


@triton.jit
def _end(ordered, index, IN_REGISTERS: tl.constexpr):
    """The row mean at a rank, from a tensor in registers or from memory."""
    return tl.gather(ordered, index, 0) if IN_REGISTERS else tl.load(ordered + index)


@triton.jit
def _search(mean, ordered, n, rank, steps, IN_REGISTERS: tl.constexpr):
    """Threshold of every row mean in `mean`, given all row means of the image in rising order."""
    # `low` ends at the first window whose left end is no farther than its right end; at `rank` where there is none.
    low = tl.zeros(mean.shape, tl.int32)
    high = low + rank
    for _ in range(steps):
        middle = (low + high) // 2
        window = tl.minimum(middle, rank - 1)
        left = mean - _end(ordered, window, IN_REGISTERS)
        right = _end(ordered, window + (n - rank), IN_REGISTERS) - mean
        searching = low < high
        crossed = left <= right
        high = tl.where(searching & crossed, middle, high)
        low = tl.where(searching & (crossed == 0), middle + 1, low)
    right = _end(ordered, tl.minimum(low, rank - 1) + (n - rank), IN_REGISTERS) - mean
    left = mean - _end(ordered, tl.maximum(low - 1, 0), IN_REGISTERS)
    right = tl.where(low < rank, right, float("inf"))
    return tl.minimum(right, tl.where(low > 0, left, float("inf")))


@triton.jit(do_not_specialize=["n", "rank", "steps"])
def split_threshold_image(
    query, key, row_mean, threshold, query_b, query_n, key_b, key_n, n, rank, steps,
    CHANNELS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One image: chunks of channels pass through, all tokens at once; then sort and search in registers."""
    image = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, BLOCK_N)
    valid = row < n
    mean = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, CHANNELS, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C)
        mask = valid[:, None] & (channel < CHANNELS)[None, :]
        at = key + image * key_b + row.to(tl.int64)[:, None] * key_n + channel[None, :]
        centre = tl.sum(tl.load(at, mask=mask, other=0.0).to(tl.float32), 0) / n
        at = query + image * query_b + row.to(tl.int64)[:, None] * query_n + channel[None, :]
        mean += tl.sum(tl.load(at, mask=mask, other=0.0).to(tl.float32) * centre[None, :], 1)
    ordered = tl.sort(tl.where(valid, mean, float("inf")))
    found = _search(mean, ordered, n, rank, steps, True)
    tl.store(row_mean + image * n + row, mean, mask=valid)
    tl.store(threshold + image * n + row, found, mask=valid)


@triton.jit(do_not_specialize=["n"])
def split_threshold_centre(
    key, centre, key_b, key_n, n, CHANNELS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr
):
    """The mean key ``[B, C]`` in float32; a program owns BLOCK_C channels of one image, so no partial sums exist."""
    chunks = tl.cdiv(CHANNELS, BLOCK_C)
    image = (tl.program_id(0) // chunks).to(tl.int64)
    channel = tl.program_id(0) % chunks * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for start in range(0, n, BLOCK_N):
        row = start + tl.arange(0, BLOCK_N)
        mask = (row < n)[:, None] & (channel < CHANNELS)[None, :]
        at = key + image * key_b + row.to(tl.int64)[:, None] * key_n + channel[None, :]
        total += tl.load(at, mask=mask, other=0.0).to(tl.float32)
    tl.store(centre + image * CHANNELS + channel, tl.sum(total, 0) / n, mask=channel < CHANNELS)


@triton.jit(do_not_specialize=["n"])
def split_threshold_rows(
    query, centre, row_mean, query_b, query_n, n, CHANNELS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Row means of BLOCK_N tokens."""
    blocks = tl.cdiv(n, BLOCK_N)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    row = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = row < n
    products = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for start in range(0, CHANNELS, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C)
        inside = channel < CHANNELS
        at = query + image * query_b + row.to(tl.int64)[:, None] * query_n + channel[None, :]
        tokens = tl.load(at, mask=valid[:, None] & inside[None, :], other=0.0).to(tl.float32)
        products += tokens * tl.load(centre + image * CHANNELS + channel, mask=inside, other=0.0)[None, :]
    tl.store(row_mean + image * n + row, tl.sum(products, 1), mask=valid)


@triton.jit(do_not_specialize=["n", "rank", "steps"])
def split_threshold_search(row_mean, ordered, threshold, n, rank, steps, BLOCK_N: tl.constexpr):
    """Thresholds of BLOCK_N tokens from the sorted row means of their image."""
    blocks = tl.cdiv(n, BLOCK_N)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    row = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    mean = tl.load(row_mean + image * n + row, mask=row < n, other=0.0)
    found = _search(mean, ordered + image * n, n, rank, steps, False)
    tl.store(threshold + image * n + row, found, mask=row < n)


def split_threshold(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """The mean score of each row, and the distance from which another row counts as far (section 5.4).

    ``r_i = mean_j query_i . key_j``; ``t_i`` is the ``max(1, N // 2)``-th largest of ``|r_i - r_j|`` over all j, to the
    last bit.

    Args:
        query, key: ``[B, N, C]``, one of float32, bfloat16, float16; N >= 1.

    Returns:
        row_mean ``[B, N]`` and threshold ``[B, N]``, float32, also under autocast. Carries no gradient.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or device.
    """
    check_split_threshold(query, key)
    limits.check(limits.split(query))
    return torch.ops.simmp_fast.split_threshold(query.detach(), key.detach())


def _fake(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    row_mean = query.new_empty(query.shape[:2], dtype=torch.float32)
    return row_mean, torch.empty_like(row_mean)


@operator("split_threshold", _fake)
def _threshold(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    check_launchable(query=query, key=key)
    row_mean, threshold = _fake(query, key)
    if row_mean.numel() == 0:
        return row_mean, threshold
    query, key = rows_contiguous(query), rows_contiguous(key)
    tokens = query.shape[1]
    rank = max(1, tokens // 2)
    if tokens <= ONE_LAUNCH:
        config = pick("split_threshold_image", "float32", tokens, query.device)
        launch(
            split_threshold_image, (len(query),), config, query.device, query, key, row_mean, threshold,
            *query.stride()[:2], *key.stride()[:2], tokens, rank, rank.bit_length(), CHANNELS=query.shape[2],
            BLOCK_N=max(16, triton.next_power_of_2(tokens)),
        )  # fmt: skip
    else:
        _long(query, key, row_mean, threshold, rank)
    return row_mean, threshold


def _long(query: Tensor, key: Tensor, row_mean: Tensor, threshold: Tensor, rank: int) -> None:
    """Fill both results for sequences too long for one program."""
    images, tokens, channels = query.shape
    device = query.device
    centre = query.new_empty((images, channels), dtype=torch.float32)
    config = pick("split_threshold_centre", "float32", 1, device)
    grid = (images * -(-channels // config.tiles["BLOCK_C"]),)
    launch(split_threshold_centre, grid, config, device, key, centre, *key.stride()[:2], tokens, CHANNELS=channels)
    config = pick("split_threshold_rows", "float32", 1, device)
    grid = (images * -(-tokens // config.tiles["BLOCK_N"]),)
    launch(
        split_threshold_rows, grid, config, device, query, centre, row_mean, *query.stride()[:2], tokens,
        CHANNELS=channels,
    )  # fmt: skip
    ordered = row_mean.sort(-1).values
    config = pick("split_threshold_search", "float32", 1, device)
    grid = (images * -(-tokens // config.tiles["BLOCK_N"]),)
    launch(split_threshold_search, grid, config, device, row_mean, ordered, threshold, tokens, rank, rank.bit_length())


def _flops(query: tuple[int, ...], *_: object, **__: object) -> int:
    images, tokens, channels = query
    return 3 * images * tokens * channels


flops("split_threshold", _flops)

_KERNELS = {
    "split_threshold_image": split_threshold_image,
    "split_threshold_centre": split_threshold_centre,
    "split_threshold_rows": split_threshold_rows,
    "split_threshold_search": split_threshold_search,
}


def _signature(name: str, config: Config, dtype: str) -> Signature:
    arguments = dict.fromkeys(("query", "key"), POINTERS[dtype])
    arguments |= dict.fromkeys(("row_mean", "threshold", "centre", "ordered"), "*fp32:16")
    arguments |= dict.fromkeys(("query_b", "query_n", "key_b", "key_n"), "i32:16")
    arguments |= dict.fromkeys(("n", "rank", "steps"), "i32")
    constants: dict[str, object] = {"CHANNELS": 384}
    if name == "split_threshold_image":
        constants["BLOCK_N"] = config.width
    names = _KERNELS[name].arg_names
    return Signature(
        _KERNELS[name],
        {key: text for key, text in arguments.items() if key in names},
        {key: value for key, value in constants.items() if key in names},
        products=False,
    )


for _name in _KERNELS:
    register_kernel(_name, functools.partial(_signature, _name))
