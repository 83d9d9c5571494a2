"""`window_similarity` and the decay weights that follow from it: one launch each, x read once (sections 5.1, 5.2).

With ``u_i = x_i / max(|x_i|, 1e-8)`` the sum over ``i <= j`` of ``cos(x_i, x_j)`` is
``(|sum_i u_i|^2 + sum_i |u_i|^2) / 2``: no pair is ever formed. A program owns one window of one image. Blocks of its
tokens pass through registers with all their channels, so that a token's norm is known before it leaves; the sum of the
unit vectors, one number a channel, stays. Where neighbouring tokens lie beside each other in memory (channels-first)
tokens run across the threads, otherwise channels do; strides are free.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import limits
from ..validation import check_decay_weights, check_window_similarity
from .aot import POINTERS, Signature, register_kernel
from .configs import Config, pick, register_table
from .launch import check_launchable, launch
from .register import flops, operator

NORM_FLOOR = tl.constexpr(1e-8)

# Width is the number of channels for the similarity (more take the widest row, and spill), any for the weights.
# kernel           dtype width capabilities tiles       warps stages shared_KiB stack provenance
register_table("""
window_similarity  any   128   all          BLOCK_T=16  4     1      48         0     ahead-of-time
window_similarity  any   512   all          BLOCK_T=16  8     1      48         0     ahead-of-time
window_similarity  any   2048  all          BLOCK_T=4   16    1      48         0     ahead-of-time
window_similarity  any   8192  all          BLOCK_T=1   16    1      48         0     ahead-of-time
decay_weights      any   1     all          BLOCK_T=32,BLOCK_V=32  4     1      48         0     ahead-of-time
""")
WIDEST = 8192


@triton.jit(do_not_specialize=["window", "windows_x", "windows"])
def window_similarity_kernel(
    x, score, x_b, x_c, x_h, x_w, window, windows_x, windows,
    CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    image = (tl.program_id(0) // windows).to(tl.int64)
    place = tl.program_id(0) % windows
    top = place // windows_x * window
    left = place % windows_x * window
    channel = tl.arange(0, BLOCK_C)
    inside = channel < CHANNELS
    channels = channel.to(tl.int64) * x_c
    axis: tl.constexpr = 1 if CHANNELS_LAST else 0  # of the channels in a tile
    total = tl.zeros([BLOCK_C], tl.float32)
    squares = tl.zeros([BLOCK_T], tl.float32)
    for start in range(0, window * window, BLOCK_T):
        token = start + tl.arange(0, BLOCK_T)
        valid = token < window * window
        tokens = (top + token // window).to(tl.int64) * x_h + (left + token % window).to(tl.int64) * x_w
        base = x + image * x_b
        if CHANNELS_LAST:
            mask = valid[:, None] & inside[None, :]
            tile = tl.load(base + tokens[:, None] + channels[None, :], mask=mask, other=0.0).to(tl.float32)
        else:
            mask = valid[None, :] & inside[:, None]
            tile = tl.load(base + tokens[None, :] + channels[:, None], mask=mask, other=0.0).to(tl.float32)
        square = tl.sum(tile * tile, axis)
        inverse = 1.0 / tl.maximum(tl.sqrt_rn(square), NORM_FLOOR)
        squares += square * inverse * inverse
        total += tl.sum(tile * tl.expand_dims(inverse, axis), 1 - axis)
    result = (tl.sum(total * total, 0) + tl.sum(squares, 0)) * 0.5
    tl.store(score + tl.program_id(0).to(tl.int64), result)


def window_similarity(x: Tensor, window: int) -> Tensor:
    """In each window, the sum over ``i <= j`` of ``cos(x_i, x_j)`` over its tokens (section 5.1).

    Each norm is clamped at 1e-8.

    Args:
        x: ``[B, C, H, W]``, one of float32, bfloat16, float16; any strides, read once.
        window: side of a window in tokens, a divisor of H and of W.

    Returns:
        score ``[B, n_windows]``, windows in row-major order, float32. Carries no gradient.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or device; a window that does not divide the grid.
    """
    check_window_similarity(x, window)
    limits.check(limits.window_similarity(x, window))
    return torch.ops.simmp_fast.window_similarity(x.detach(), window)


def _similarity_fake(x: Tensor, window: int) -> Tensor:
    windows = (x.shape[2] // window) * (x.shape[3] // window)
    return x.new_empty((x.shape[0], windows), dtype=torch.float32)


@operator("window_similarity", _similarity_fake)
def _similarity(x: Tensor, window: int) -> Tensor:
    check_launchable(x=x)
    score = _similarity_fake(x, window)
    channels = x.shape[1]
    config = pick("window_similarity", "float32", min(channels, WIDEST), x.device)
    launch(
        window_similarity_kernel, (score.numel(),), config, x.device, x, score, *x.stride(), window,
        x.shape[3] // window, score.shape[1], CHANNELS=channels, BLOCK_C=triton.next_power_of_2(max(1, channels)),
        CHANNELS_LAST=x.stride(1) < x.stride(3),
    )  # fmt: skip
    return score


@triton.jit(do_not_specialize=["height", "width", "window", "windows_x", "windows", "gamma"])
def decay_weights_kernel(
    score, weights, score_b, score_w, height, width, window, windows_x, windows, gamma,
    RELEASED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """A program ranks the windows of BLOCK_T tokens of one image; similar: fewer than half come before it."""
    blocks = tl.cdiv(height * width, BLOCK_T)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    token = tl.program_id(0) % blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    valid = token < height * width
    own = token // width // window * windows_x + token % width // window
    scores = score + image * score_b
    mine = tl.load(scores + own.to(tl.int64) * score_w, mask=valid, other=0.0)[:, None]
    before = tl.zeros([BLOCK_T], tl.int32)
    for start in range(0, windows, BLOCK_V):
        other = start + tl.arange(0, BLOCK_V)
        theirs = tl.load(scores + other.to(tl.int64) * score_w, mask=other < windows, other=float("-inf"))[None, :]
        ahead = (theirs > mine) | ((theirs == mine) & (other[None, :] < own[:, None]))
        before += tl.sum(ahead.to(tl.int32), 1)
    similar = before < windows // 2
    if RELEASED:
        later = image > 0
        of_query = tl.where((similar == 0) & later, 1.0, 0.0)
        of_key = tl.where(similar & later, 1.0, 0.0)
    else:
        of_query = tl.where(similar, gamma, 1.0)
        of_key = tl.where(similar, 1.0, gamma)
    place = weights + (image * (height * width) + token) * 3
    tl.store(place, of_query.to(weights.dtype.element_ty), mask=valid)
    tl.store(place + 1, of_key.to(weights.dtype.element_ty), mask=valid)
    tl.store(place + 2, tl.full([BLOCK_T], 1.0, weights.dtype.element_ty), mask=valid)


def decay_weights(
    score: Tensor, grid: tuple[int, int], window: int, gamma: float, variant: str, dtype: torch.dtype
) -> Tensor:
    """The weight of every token in the query, the key and the value projection (section 5.2; section 9, row 1).

    One launch, no host sync; see `simmp_fast.reference.decay_weights` for what they are.

    Args:
        score: ``[B, n_windows]``, floating, from `window_similarity`; windows in row-major order.
        grid: height and width in tokens.
        window: side of a window in tokens, a divisor of both.
        gamma: the decay.
        variant: ``"paper"`` or ``"released"``.
        dtype: dtype of the weights, floating.

    Returns:
        ``[B, H * W, 3]``: query, key, value. Carries no gradient.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or choice.
    """
    check_decay_weights(score, grid, window, variant)
    limits.check(limits.decay_weights(score, grid))
    return torch.ops.simmp_fast.decay_weights(score.detach(), *grid, window, gamma, variant == "released", dtype)


def _weights_fake(
    score: Tensor, height: int, width: int, window: int, gamma: float, released: bool, dtype: torch.dtype
) -> Tensor:
    return score.new_empty((score.shape[0], height * width, 3), dtype=dtype)


@operator("decay_weights", _weights_fake)
def _weights(
    score: Tensor, height: int, width: int, window: int, gamma: float, released: bool, dtype: torch.dtype
) -> Tensor:
    check_launchable(score=score)
    weights = _weights_fake(score, height, width, window, gamma, released, dtype)
    config = pick("decay_weights", "float32", 1, score.device)
    launch(
        decay_weights_kernel, (len(score) * -(-height * width // config.tiles["BLOCK_T"]),), config, score.device,
        score, weights, *score.stride(), height, width, window, width // window, score.shape[1], gamma,
        RELEASED=released,
    )  # fmt: skip
    return weights


def _flops(x: tuple[int, ...], *_: object, **__: object) -> int:
    images, channels, height, width = x
    return 4 * images * channels * height * width


def _weights_flops(score: tuple[int, ...], height: int, width: int, *_: object, **__: object) -> int:
    return score[0] * score[1] * height * width


flops("window_similarity", _flops)
flops("decay_weights", _weights_flops)


def _similarity_signature(config: Config, dtype: str) -> Signature:
    arguments: dict[str, str | tuple[str, ...]] = {"x": POINTERS[dtype], "score": "*fp32:16"}
    arguments |= {"x_b": "i32:16", **dict.fromkeys(("x_c", "x_h", "window", "windows_x", "windows"), "i32")}
    channels = {512: 384}.get(config.width, config.width)
    constants = {"CHANNELS": channels, "BLOCK_C": config.width, "CHANNELS_LAST": False, "x_w": 1}
    return Signature(window_similarity_kernel, arguments, constants, products=False)


def _weights_signature(config: Config, dtype: str) -> Signature:
    arguments = {"score": "*fp32:16", "weights": POINTERS[dtype]}
    arguments |= dict.fromkeys(("score_b", "height", "width", "window", "windows_x", "windows"), "i32")
    return Signature(
        decay_weights_kernel, arguments | {"gamma": "fp32"}, {"score_w": 1, "RELEASED": False}, products=False
    )


register_kernel("window_similarity", _similarity_signature)
register_kernel("decay_weights", _weights_signature)
