"""The loss over all non-empty subsets of the heads (section 7).

Two passes over chunks of pixels: the forward pass adds up what cross-entropy and Dice need, per subset and class; the
backward pass computes the probabilities of a chunk again and writes the gradient of each head. No graph of subsets is
kept and no head is held at the size of the label. A chunk is laid out as ``[subsets, classes, pixels]``, subset S (a
bit mask of the heads) at place S - 1: every operation runs over long contiguous vectors of pixels, for all subsets.

Each head is in half of the subsets: the part of the gradient that is the same in all of them, that of the label's own
logit in cross-entropy, is taken once a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..validation import check_powerset_loss, transformed, within
from .precision import at_least_float32, exp_, no_autocast
from .resize import Band, ResizedHeads

# Pixels in a chunk: on a CPU the tensors of a chunk stay in the last-level cache, elsewhere launches weigh more.
CPU_CHUNK = 8192
CHUNK = 1 << 17


def _chunk(label: Tensor) -> int:
    return CPU_CHUNK if label.device.type == "cpu" else CHUNK


class _Workspace:
    """Two buffers for the largest chunk, used by every chunk: fresh memory would cost more than the arithmetic."""

    def __init__(self, source: ResizedHeads, label: Tensor) -> None:
        height, width = source.size
        pixels = min(max(_chunk(label), width), height * width)
        subsets = 2**source.count - 1
        self._shape = (subsets, source.classes, -1)
        self._length = subsets * source.classes
        self._flat = torch.empty((2, self._length * pixels), dtype=source.dtype, device=label.device)

    def pair(self, pixels: int) -> tuple[Tensor, Tensor]:
        """Two ``[subsets, classes, pixels]``."""
        first, second = (flat[: self._length * pixels].view(self._shape) for flat in self._flat)
        return first, second


def _centred_logits(source: ResizedHeads, band: Band, logits: Tensor) -> None:
    """Write the sum of the heads of every subset, less its largest class, to `logits`."""
    for i in range(source.count):
        bit = 1 << i
        source.read(i, band, out=logits[bit - 1])
        torch.add(logits[: bit - 1], logits[bit - 1], out=logits[bit : 2 * bit - 1])
    logits.sub_(logits.amax(1, keepdim=True))


def _softmax_(centred: Tensor) -> Tensor:
    """Softmax over the classes, in place, of logits whose peak is 0; returns the sum of exponentials."""
    total = exp_(centred).sum(1, keepdim=True)
    centred.mul_(total.reciprocal())
    return total


def powerset_sums(heads: Sequence[Tensor], label: Tensor) -> Tensor:
    """What the loss needs of all pixels; sums of several batches add up to those of the batches together.

    Returns:
        ``[2^heads, 2 classes + 1]``: in a subset's row the overlap and the square of each class; in the empty subset's
        row the label's pixels of each class and, last, the cross-entropy of all subsets, NaN for a label outside.
    """
    with no_autocast(label):
        source = ResizedHeads(heads, (label.shape[1], label.shape[2]))
        subsets, classes = 2 ** len(heads) - 1, heads[0].shape[1]
        # Sums over all pixels in float64 where the device has it: it costs nothing, and no order of chunks shows.
        precise = source.dtype if label.device.type == "mps" else torch.float64
        sums = torch.zeros((1 + subsets, 2 * classes + 1), dtype=precise, device=label.device)
        overlap, square, cross_entropy = sums[1:, :classes], sums[1:, classes:-1], sums[0, -1]
        names = torch.arange(classes, device=label.device).unsqueeze(1)
        space = _Workspace(source, label)
        for band in source.bands(_chunk(label)):
            target = label[band.image, band.rows].reshape(1, -1)
            member = (target == names).to(source.dtype)
            probabilities, product = space.pair(target.shape[1])
            _centred_logits(source, band, probabilities)
            place, known = within(target, classes)
            chosen = probabilities.gather(1, place.expand(subsets, 1, -1)).masked_fill_(~known, torch.nan)
            total = _softmax_(probabilities)
            cross_entropy += (total.log_() - chosen).sum(dtype=precise)
            overlap += torch.mul(probabilities, member, out=product).sum(-1)
            square += probabilities.square_().sum(-1)
        sums[0, :classes] = (label.reshape(1, -1) == names).sum(1)
        return sums


def powerset_terms(
    sums: Tensor, pixels: int, ce_weight: float, dice_weight: float, smooth: float
) -> tuple[Tensor, Tensor]:
    """The loss from the sums over `pixels`, and its derivatives.

    Returns:
        0-d loss; ``[2^heads - 1, 2 classes + 1]``, its derivatives by a subset's overlaps, by its squares and by the
        cross-entropy of a pixel.
    """
    classes = sums.shape[1] // 2
    overlap, area = 2 * sums[1:, :classes] + smooth, sums[1:, classes:-1] + sums[0, :classes] + smooth
    weight = dice_weight / classes
    loss = ce_weight / pixels * sums[0, -1] + weight * (1 - overlap / area).sum()
    spoiled = torch.where(sums[0, -1].isnan(), sums[0, -1], 0.0)  # by a label outside, whatever the weights
    by_pixel = spoiled + area.new_full((len(area), 1), ce_weight / pixels)
    return loss, torch.cat([-2 * weight / area, 2 * weight * overlap / area.square(), by_pixel], 1)


@torch.library.custom_op("simmp_fast::portable_powerset_loss", mutates_args=())
def _loss(
    heads: Sequence[Tensor], label: Tensor, ce_weight: float, dice_weight: float, smooth: float
) -> tuple[Tensor, Tensor]:
    """The loss and its derivatives, as `powerset_terms`, in the dtype of the loss."""
    dtype = torch.promote_types(heads[0].dtype, torch.float32)
    loss, slopes = powerset_terms(powerset_sums(heads, label), label.numel(), ce_weight, dice_weight, smooth)
    return loss.to(dtype), slopes.to(dtype)


@_loss.register_fake
def _(
    heads: Sequence[Tensor], label: Tensor, ce_weight: float, dice_weight: float, smooth: float
) -> tuple[Tensor, Tensor]:
    loss = heads[0].new_empty((), dtype=torch.promote_types(heads[0].dtype, torch.float32))
    return loss, loss.new_empty((2 ** len(heads) - 1, 2 * heads[0].shape[1] + 1))


@torch.library.custom_op("simmp_fast::portable_powerset_loss_backward", mutates_args=())
def powerset_gradients(grad: Tensor, heads: Sequence[Tensor], label: Tensor, slopes: Tensor) -> list[Tensor]:
    """The gradient of each head. With p the probabilities and y the label as one-hot, that of a subset's logits is
    ``p * (g - sum_c p g) + e * (p - y)``: g = `by_overlap` * y + `by_square` * p, e the weight of a pixel's CE."""
    with no_autocast(label):
        source = ResizedHeads(heads, (label.shape[1], label.shape[2]))
        grads, classes = source.new_gradients(), source.classes
        by_overlap, by_square = (slopes * grad)[:, :-1].unsqueeze(-1).split(classes, 1)
        entropy = grad * slopes[0, -1]
        names = torch.arange(classes, device=label.device).unsqueeze(1)
        space = _Workspace(source, label)
        for band in source.bands(_chunk(label)):
            target = label[band.image, band.rows].reshape(1, -1)
            member = (target == names).to(source.dtype)
            probabilities, gradient = space.pair(target.shape[1])
            _centred_logits(source, band, probabilities)
            _softmax_(probabilities)
            torch.mul(probabilities, by_square, out=gradient).addcmul_(member, by_overlap).mul_(probabilities)
            gradient.addcmul_(probabilities, entropy - gradient.sum(1, keepdim=True))
            constant = member * (2 ** (len(heads) - 1) * entropy)
            for i in reversed(range(len(heads))):
                bit = 1 << i
                lower, upper = gradient[: bit - 1], gradient[bit - 1 : 2 * bit - 1]
                source.add_gradient(i, band, upper.sum(0) - constant, grads)
                lower += upper[1:]
        return source.finish(grads, heads[0].dtype)


@powerset_gradients.register_fake
def _(grad: Tensor, heads: Sequence[Tensor], label: Tensor, slopes: Tensor) -> list[Tensor]:
    return [torch.empty_like(head, memory_format=torch.contiguous_format) for head in heads]


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    heads, label = inputs[:2]
    ctx.save_for_backward(label, output[1], *heads)


def _differentiate(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[object, ...]:
    label, slopes, *heads = ctx.saved_tensors
    return powerset_gradients(grad, heads, label, slopes), None, None, None, None


_loss.register_autograd(_differentiate, setup_context=_save)


def powerset_loss(
    heads: Sequence[Tensor],
    label: Tensor,
    *,
    ce_weight: float = 0.3,
    dice_weight: float = 0.7,
    smooth: float = 1e-5,
) -> Tensor:
    """``sum_S (ce_weight * CE(z_S, label) + dice_weight * Dice(softmax z_S, label))``, z_S the sum of the heads in S.

    One pass over chunks of pixels, and one more for the gradients: see the head of this file. Differentiable once.

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
        TypeError, ValueError: an argument of the wrong dtype, shape or device; a call under `torch.func`.
    """
    check_powerset_loss(heads, label)
    if transformed():
        raise ValueError(
            "powerset_loss: got a call under torch.func or forward-mode AD, which do not see into this implementation, "
            "expected backend 'auto' or 'reference', the definition"
        )
    if label.numel() == 0:
        return torch.stack([at_least_float32(head).sum() * 0 for head in heads]).sum()
    return _loss(list(heads), label, ce_weight, dice_weight, smooth)[0]
