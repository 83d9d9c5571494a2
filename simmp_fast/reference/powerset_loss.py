"""The loss over all non-empty subsets of the heads (section 7)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..validation import check_powerset_loss, nan_unless, within
from .precision import at_least_float32


def _dice_loss(probabilities: Tensor, target: Tensor, smooth: float) -> Tensor:
    """Mean over all classes of one minus the soft Dice of the whole batch; both ``[B, classes, h, w]``."""
    over = (0, 2, 3)
    overlap = (probabilities * target).sum(over)
    sizes = (probabilities * probabilities).sum(over) + target.sum(over)
    return (1 - (2 * overlap + smooth) / (sizes + smooth)).mean()


def powerset_loss(
    heads: Sequence[Tensor],
    label: Tensor,
    *,
    ce_weight: float = 0.3,
    dice_weight: float = 0.7,
    smooth: float = 1e-5,
) -> Tensor:
    """``sum_S (ce_weight * CE(z_S, label) + dice_weight * Dice(softmax z_S, label))``, ``z_S`` the sum of heads in S.

    Args:
        heads: up to six tensors ``[B, classes, h_i, w_i]``, one floating dtype; a head smaller than the label is
            resized to it (bilinear, ``align_corners=False``).
        label: ``[B, h, w]``, int64 in ``[0, classes)``; one outside makes the loss and all its gradients NaN.
        ce_weight: weight of the pixel-mean cross-entropy.
        dice_weight: weight of the Dice term, the mean over all classes, background included.
        smooth: added to numerator and denominator of Dice.

    Returns:
        0-d loss, float32 or better; 0 for an empty batch. The gradient reaches every head.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or device.
    """
    check_powerset_loss(heads, label)
    logits = [at_least_float32(head) for head in heads]
    if label.numel() == 0:
        return torch.stack([z.sum() * 0 for z in logits]).sum()
    label, known = within(label, logits[0].shape[1])
    size = label.shape[-2:]
    logits = [z if z.shape[-2:] == size else F.interpolate(z, size, mode="bilinear") for z in logits]
    target = F.one_hot(label, logits[0].shape[1]).movedim(-1, 1).to(logits[0].dtype)
    terms = []
    for count in range(1, len(logits) + 1):
        for subset in combinations(logits, count):
            total = torch.stack(subset).sum(0)
            cross_entropy = F.cross_entropy(total, label)
            dice = _dice_loss(total.softmax(1), target, smooth)
            terms.append(ce_weight * cross_entropy + dice_weight * dice)
    total_loss = torch.stack(terms).sum()
    return total_loss * nan_unless(known.all(), total_loss)
