"""The subset loss as an operator: launches, registration, gradients and operation counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import limits
from ...validation import check_powerset_loss
from ..configs import pick
from ..launch import check_launchable, launch
from ..register import autograd, flops, operator
from .geometry import same_grid, tiling
from .table import KERNELS, padded_classes


def powerset_loss(
    heads: Sequence[Tensor],
    label: Tensor,
    *,
    ce_weight: float = 0.3,
    dice_weight: float = 0.7,
    smooth: float = 1e-5,
) -> Tensor:
    """``sum_S (ce_weight * CE(z_S, label) + dice_weight * Dice(softmax z_S, label))`` (section 7).

    S runs over the non-empty subsets of the heads, ``z_S`` is the sum of the heads in S. Heads smaller than the label
    are resized inside (bilinear, ``align_corners=False``): nothing of the size of the resized logits is allocated,
    forward or backward.

    Args:
        heads: up to six tensors ``[B, classes, h_i, w_i]``, one of float32, bfloat16, float16; up to 32 classes.
        label: ``[B, h, w]``, int64 in ``[0, classes)``; one outside makes the loss and all its gradients NaN.
        ce_weight: weight of the pixel-mean cross-entropy.
        dice_weight: weight of the Dice term, the mean over all classes, background included.
        smooth: added to numerator and denominator of Dice.

    Returns:
        0-d float32 loss; 0 for an empty batch. The gradient reaches every head, deterministic.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or device.
    """
    check_powerset_loss(heads, label)
    limits.check(limits.powerset_loss(heads, label))
    return torch.ops.simmp_fast.powerset_loss(list(heads), label, ce_weight, dice_weight, smooth, None)[0]


def _forward_fake(
    heads: Sequence[Tensor], label: Tensor, ce_weight: float, dice_weight: float, smooth: float,
    subset_weight: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    loss = heads[0].new_empty((), dtype=torch.float32)
    return loss, loss.new_empty(((1 << len(heads)) - 1, 2 * heads[0].shape[1] + 1))


def _grids(heads: Sequence[Tensor]) -> list[tuple[int, int]]:
    return [(head.shape[2], head.shape[3]) for head in heads]


def _geometry(heads: Sequence[Tensor]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sizes and strides of the heads as the kernels take them."""
    return tuple(side for grid in _grids(heads) for side in grid), tuple(s for head in heads for s in head.stride())


@operator("powerset_loss", _forward_fake)
def _forward(
    heads: Sequence[Tensor], label: Tensor, ce_weight: float, dice_weight: float, smooth: float,
    subset_weight: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The loss, and the coefficients ``[2^heads - 1, 2 classes + 1]`` of its gradient.

    `subset_weight`, ``[2^heads - 1]`` float32 or None for ones, weighs the subsets in the order of their bit masks. It
    has no default: of an operator that takes a list, PyTorch 2.11 wants no gradient for arguments left at theirs.
    """
    if label.numel() == 0:
        loss = torch.zeros((), dtype=torch.float32, device=label.device)
        return loss, loss.new_zeros(((1 << len(heads)) - 1, 2 * heads[0].shape[1] + 1))
    return _terms(_tile_sums(heads, label), label.numel(), ce_weight, dice_weight, smooth, subset_weight)


def _tile_sums(heads: Sequence[Tensor], label: Tensor) -> Tensor:
    """``[2^heads, tiles, 2 classes + 1]``, the sums over each tile of pixels."""
    check_launchable(**{f"heads[{i}]": head.detach() for i, head in enumerate(heads)})
    count, classes, device = len(heads), heads[0].shape[1], label.device
    height, width = label.shape[1:]
    block_k = padded_classes(classes)
    config = pick("powerset_loss_sums", "float32", count * block_k, device)
    tiles = len(label) * -(-height * width // config.tiles["BLOCK_P"])
    partials = torch.empty((1 << count, tiles, 2 * classes + 1), dtype=torch.float32, device=device)
    launch(
        KERNELS["powerset_loss_sums"], (tiles,), config, device, tuple(heads), *_geometry(heads), label, partials,
        height, width, *label.stride(), HEADS=count, SAME=same_grid(_grids(heads), (height, width)),
        CLASSES=classes, BLOCK_K=block_k,
    )  # fmt: skip
    return partials


def _terms(
    partials: Tensor, pixels: int, ce_weight: float, dice_weight: float, smooth: float, subset_weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The loss and the coefficients of its gradient from the sums over tiles that hold `pixels`."""
    subsets, tiles, width = partials.shape[0] - 1, *partials.shape[1:]
    classes, device = width // 2, partials.device
    terms, coefficients = partials.new_empty(subsets), partials.new_empty((subsets, width))
    launch(
        KERNELS["powerset_loss_terms"], (subsets,), pick("powerset_loss_terms", "float32", 1, device), device,
        partials, subset_weight, terms, coefficients, tiles, float(pixels), ce_weight, dice_weight, smooth,
        WEIGHTED=subset_weight is not None, CLASSES=classes, BLOCK_K=padded_classes(classes),
    )  # fmt: skip
    return terms.sum(), coefficients


def powerset_sums(heads: Sequence[Tensor], label: Tensor) -> Tensor:
    """``[2^heads, 2 classes + 1]``: what the loss needs of all pixels; sums of several batches add up."""
    sums = _tile_sums(heads, label).sum(1)
    sums[0, heads[0].shape[1] :] = 0  # never written
    return sums


def powerset_terms(
    sums: Tensor, pixels: int, ce_weight: float, dice_weight: float, smooth: float
) -> tuple[Tensor, Tensor]:
    """The loss from the sums over `pixels`, and the coefficients of its gradient."""
    return _terms(sums.unsqueeze(1), pixels, ce_weight, dice_weight, smooth, None)


def _backward_fake(upstream: Tensor, heads: Sequence[Tensor], label: Tensor, coefficients: Tensor) -> list[Tensor]:
    return [torch.empty(head.shape, dtype=head.dtype, device=head.device) for head in heads]


@operator("powerset_loss_backward", _backward_fake)
def powerset_gradients(upstream: Tensor, heads: Sequence[Tensor], label: Tensor, coefficients: Tensor) -> list[Tensor]:
    if label.numel() == 0:
        return [torch.zeros(head.shape, dtype=head.dtype, device=head.device) for head in heads]
    gradients = _backward_fake(upstream, heads, label, coefficients)
    count, classes = len(heads), heads[0].shape[1]
    height, width = label.shape[1:]
    device = label.device
    block_k = padded_classes(classes)
    pixels = pick("powerset_loss_pixels", "float32", count * block_k, device)
    cells = pick("powerset_loss_cells", "float32", 1, device)
    tile = {axis: pixels.tiles[axis] for axis in ("TILE_Y", "TILE_X")}
    plan = tiling(_grids(heads), (height, width), len(label), classes, list(tile.values()), cells.tiles["BLOCK"])
    workspace = coefficients.new_empty(max(1, plan.workspace))
    sizes, strides = _geometry(heads)
    constants: dict[str, Any] = {
        "CELLS_Y": plan.cells_y, "CELLS_X": plan.cells_x, "HEADS": count,
        "SAME": same_grid(_grids(heads), (height, width)), "CLASSES": classes,
    }  # fmt: skip
    upstream = upstream.to(torch.float32)
    launch(
        KERNELS["powerset_loss_pixels"], (plan.tiles,), pixels, device, tuple(heads), tuple(gradients), sizes, strides,
        plan.offsets, label, coefficients, upstream, workspace, height, width, *label.stride(), **constants,
        CELLS=plan.cells, BLOCK_K=block_k,
    )  # fmt: skip
    launch(
        KERNELS["powerset_loss_cells"], (len(label) * classes * plan.blocks, count), cells, device, tuple(gradients),
        sizes, plan.offsets, plan.spans, upstream, workspace, plan.blocks, height, width, **constants, **tile,
    )  # fmt: skip
    return gradients


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    heads, label = inputs[:2]
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(label, output[1], *heads)


def _gradient(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Any, ...]:
    label, coefficients, *heads = ctx.saved_tensors
    gradients = torch.ops.simmp_fast.powerset_loss_backward(upstream, heads, label, coefficients)
    return gradients, None, None, None, None, None


autograd(_forward, _keep, _gradient)


def _forward_flops(heads: Any, label: Any, *_: Any, **__: Any) -> int:
    """About ten operations for each logit of each subset at each pixel."""
    images, height, width = label
    return 10 * images * height * width * heads[0][1] * ((1 << len(heads)) - 1)


def _backward_flops(upstream: Any, heads: Any, label: Any, *_: Any, **__: Any) -> int:
    return 2 * _forward_flops(heads, label)


flops("powerset_loss", _forward_flops)
flops("powerset_loss_backward", _backward_flops)
