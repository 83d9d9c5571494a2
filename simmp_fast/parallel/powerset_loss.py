"""The subset loss of the batches of all ranks (section 7)."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import ops
from ..ranks import ALONE, Ranks
from ..validation import check_powerset_loss

# Where the three parts of the loss are: sums over pixels, loss and slopes from the sums, gradients of the heads. The
# definition has no parts.
_PARTS = {
    "reference": "simmp_fast.portable.powerset_loss",
    "portable": "simmp_fast.portable.powerset_loss",
    "triton": "simmp_fast.kernels.powerset_loss.operators",
}


class _GlobalLoss(torch.autograd.Function):
    """Sums over the own pixels, added over the ranks; backward writes the gradient of the own heads alone."""

    @staticmethod
    def forward(
        ctx: Any, parts: Any, ranks: Ranks, label: Tensor, weights: tuple[float, float, float], *heads: Tensor
    ) -> Tensor:
        dtype = torch.promote_types(heads[0].dtype, torch.float32)
        sums = ranks.total(parts.powerset_sums(heads, label))
        loss, slopes = parts.powerset_terms(sums, ranks.size * label.numel(), *weights)
        # The gradients will be averaged over the ranks: a rank's part counts `size` times what it adds to the sum.
        ctx.save_for_backward(label, ranks.size * slopes.to(dtype), *heads)
        ctx.parts = parts
        return loss.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        label, slopes, *heads = ctx.saved_tensors
        return None, None, None, None, *ctx.parts.powerset_gradients(grad, heads, label, slopes)


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

    Only sums over pixels travel. The gradient of a rank's heads is `size` times their share, so that averaged over the
    ranks, as `DistributedDataParallel` does, parameters get the gradient of one process. On several ranks the
    reference is computed by the portable operator.

    Args:
        heads, label, ce_weight, dice_weight, smooth: as in `ops.powerset_loss`; of one shape on all ranks.
        backend: operator backend.
        ranks: who takes part.

    Returns:
        0-d loss of all ranks, float32 or better, the same bits on every rank.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or device, or an empty batch on several ranks.
        BackendError: the backend cannot run on these heads.
    """
    if ranks.size == 1:
        return ops.powerset_loss(
            heads, label, ce_weight=ce_weight, dice_weight=dice_weight, smooth=smooth, backend=backend
        )
    check_powerset_loss(heads, label)
    if label.numel() == 0:
        raise ValueError(f"label: got shape {list(label.shape)}, expected at least one pixel on each of several ranks")
    parts = importlib.import_module(_PARTS[ops.loss_backend(heads, label, backend)])
    return _GlobalLoss.apply(parts, ranks, label, (ce_weight, dice_weight, smooth), *heads)
