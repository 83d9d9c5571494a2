"""The definition as TF32 has it: every float32 matrix product takes operands that were rounded to TF32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def rounded(x: Tensor) -> Tensor:
    """`x` with float32 rounded to TF32: 10 bits of fraction, ties away from zero."""
    if x.dtype != torch.float32:
        return x
    power = torch.frexp(x).exponent - 11
    unit = torch.ldexp(torch.ones_like(x, dtype=torch.float64), power)
    steps = x.double() / unit
    return (steps.sign() * (steps.abs() + 0.5).floor() * unit).float()


class Tf32Products(TorchDispatchMode):
    """Rounds what goes into every float32 matrix product, of the forward and of the backward pass.

    As cuBLAS does where TF32 is allowed, but for matrix-vector products too, which it takes in float32 all the same.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.bmm.default, torch.ops.aten.mm.default):
            self.products += 1
            args = tuple(rounded(x) for x in args)
        return func(*args, **(kwargs or {}))

    products = 0
