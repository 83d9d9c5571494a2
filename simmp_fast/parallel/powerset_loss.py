"""The subset loss of the batches of all ranks (section 7)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import ops
from ..portable.powerset_loss import Sums, loss_and_slopes, loss_gradients, powerset_sums
from ..ranks import ALONE, Ranks
from ..validation import check_powerset_loss


class _GlobalLoss(torch.autograd.Function):
    """Sums over the own pixels, added over the ranks; backward writes the gradient of the own heads alone."""

    @staticmethod
    def forward(
        ctx: Any, ranks: Ranks, label: Tensor, ce_weight: float, dice_weight: float, smooth: float, *heads: Tensor
    ) -> Tensor:
        sums = Sums(*map(ranks.total, powerset_sums(heads, label)))
        found = loss_and_slopes(sums, ranks.size * label.numel(), ce_weight, dice_weight, smooth)
        loss, by_overlap, by_square = (x.to(torch.promote_types(heads[0].dtype, torch.float32)) for x in found)
        # Gradients are averaged over the ranks, so each rank's share is `size` times what it adds to the sum. A pixel's
        # cross-entropy weighs 1 / (size * own pixels): there the factor leaves the weight that it has in one process.
        ctx.save_for_backward(label, ranks.size * by_overlap, ranks.size * by_square, *heads)
        ctx.ce_weight = ce_weight
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        label, by_overlap, by_square, *heads = ctx.saved_tensors
        gradients = loss_gradients(grad, heads, label, by_overlap, by_square, ctx.ce_weight)
        return None, None, None, None, None, *gradients


def powerset_loss(
    heads: Sequence[Tensor],
    label: Tensor,
    *,
    ce_weight: float = 0.3,
    dice_weight: float = 0.7,
    smooth: float = 1e-5,
    backend: str = "auto",
    ranks: Ranks = ALONE,
) -> Tensor:
    """`ops.powerset_loss` on the batches of all ranks: Dice of the whole batch, cross-entropy of all its pixels.

    Only the sums over pixels travel. The gradient of a rank's heads is `size` times their share, so that averaged over
    the ranks, as `DistributedDataParallel` does, parameters get the gradient of one process. Several ranks take the
    portable operator's passes whatever the backend.

    Args:
        heads, label, ce_weight, dice_weight, smooth: as in `ops.powerset_loss`; of one shape on all ranks.
        backend: operator backend.
        ranks: who takes part.

    Returns:
        0-d loss of all ranks, float32 or better, the same bits on every rank.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or device, or an empty batch on several ranks.
    """
    if ranks.size == 1:
        return ops.powerset_loss(
            heads, label, ce_weight=ce_weight, dice_weight=dice_weight, smooth=smooth, backend=backend
        )
    check_powerset_loss(heads, label)
    if label.numel() == 0:
        raise ValueError(f"label: got shape {list(label.shape)}, expected at least one pixel on each of several ranks")
    return _GlobalLoss.apply(ranks, label, ce_weight, dice_weight, smooth, *heads)
