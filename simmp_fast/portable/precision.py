"""The precision rules that the portable operators share."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from ..validation import has_autocast

LOG2_E = 1 / math.log(2)


def at_least_float32(x: Tensor) -> Tensor:
    """`x` in float32, or in float64 where it is float64 already."""
    return x if x.dtype == torch.float64 else x.float()


def no_autocast(x: Tensor) -> AbstractContextManager[object]:
    """A context in which products keep the dtype of their operands, also under autocast."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if has_autocast(kind) else nullcontext()


def exp_(x: Tensor) -> Tensor:
    """The exponential of `x`, in place. On a CPU exp2 takes a quarter of the time of exp."""
    return x.mul_(LOG2_E).exp2_()
