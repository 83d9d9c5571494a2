"""The precision rules that the reference operators share."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from ..validation import has_autocast


def at_least_float32(x: Tensor) -> Tensor:
    """`x` in float32, or in float64 where it is float64 already."""
    return x if x.dtype == torch.float64 else x.float()


def softmax_rows(scores: Tensor) -> Tensor:
    """Softmax over the last dimension in float32 or better, cast back to the dtype of `scores`."""
    return at_least_float32(scores).softmax(-1).to(scores.dtype)


def no_autocast(x: Tensor) -> AbstractContextManager[object]:
    """A context in which products keep the dtype of their operands, also under autocast."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if has_autocast(kind) else nullcontext()
