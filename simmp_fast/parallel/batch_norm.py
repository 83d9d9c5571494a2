"""Batch norm over the batches of all ranks.

PyTorch's own (`nn.SyncBatchNorm`) runs on no CPU, and on a GPU its forward waits for the device in every layer. This
one is plain PyTorch on any device and waits for nothing.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from ..portable.precision import at_least_float32
from ..ranks import Ranks

_OVER = (0, 2, 3)


def _per_channel(x: Tensor) -> Tensor:
    return x.view(1, -1, 1, 1)


class _Normalise(torch.autograd.Function):
    """``(x - mean) / sqrt(var + eps) * weight + bias`` with the moments of all ranks; returns those moments too."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, ranks: Ranks
    ) -> tuple[Tensor, Tensor, Tensor]:
        own = torch.stack(torch.var_mean(at_least_float32(x), _OVER, correction=0))
        variances, means = ranks.gather(own).unbind(1)
        mean = means.mean(0)
        var = variances.mean(0) + (means - mean).square().mean(0)
        inverse = (var + eps).rsqrt()
        scale = weight * inverse
        y = torch.addcmul(_per_channel(bias - mean * scale), x, _per_channel(scale)).to(x.dtype)
        ctx.save_for_backward(x, mean, inverse, scale)
        ctx.ranks = ranks
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, inverse, scale = ctx.saved_tensors
        grad = at_least_float32(grad)
        normalised = (x - _per_channel(mean)) * _per_channel(inverse)
        own = torch.stack([grad.sum(_OVER), (grad * normalised).sum(_OVER)])
        shift, slope = ctx.ranks.total(own) / (ctx.ranks.size * x.numel() / x.shape[1])
        by_x = (grad - _per_channel(shift) - normalised * _per_channel(slope)) * _per_channel(scale)
        return by_x.to(x.dtype), own[1], own[0], None, None


class RanksBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` whose batch, in training, is that of all ranks; each has as many images.

    Attributes:
        ranks: who takes part.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float
    ranks: Ranks

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to ``[B, C, H, W]``."""
        if not self.training:
            return super().forward(x)
        y, mean, var = _Normalise.apply(x, self.weight, self.bias, self.eps, self.ranks)
        count = self.ranks.size * x.numel() // x.shape[1]
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_((var * (count / (count - 1))).to(self.running_var.dtype), self.momentum)
        return y


class RanksBatchNormAct2d(BatchNormAct2d, RanksBatchNorm2d):
    """The same for timm's batch norm with an activation behind it."""

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to ``[B, C, H, W]``."""
        return self.act(self.drop(RanksBatchNorm2d.forward(self, x)))


_ACROSS: dict[type[_BatchNorm], type[_BatchNorm]] = {
    nn.BatchNorm2d: RanksBatchNorm2d,
    BatchNormAct2d: RanksBatchNormAct2d,
}


def synchronise_batch_norm(model: nn.Module, ranks: Ranks) -> None:
    """Let every batch norm of `model` take its moments over all ranks. Names, parameters and buffers stay as they are.

    Raises:
        TypeError: a kind of batch norm that is not known here; names it.
    """
    for name, module in model.named_modules():
        if not isinstance(module, _BatchNorm):
            continue
        across = _ACROSS.get(type(module))
        if across is None:
            known = " or ".join(kind.__name__ for kind in _ACROSS)
            raise TypeError(f"{name}: got {type(module).__name__}, expected {known}, which can be shared by ranks")
        # The class changes, the object does not: the optimiser and the state dict know its tensors already.
        module.__class__ = across
        cast(RanksBatchNorm2d, module).ranks = ranks
