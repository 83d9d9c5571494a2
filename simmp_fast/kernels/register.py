"""Registration of the kernels as `torch.library` operators of the namespace ``simmp_fast``.

`operator` makes a function a custom operator with a fake implementation; `autograd`, `autocast` and `flops` add
the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef, Library
from torch.utils.flop_counter import register_flop_formula

NAMESPACE = "simmp_fast"
_AUTOCAST_DEVICES = {"cuda": "AutocastCUDA", "cpu": "AutocastCPU"}
_library = Library(NAMESPACE, "FRAGMENT")


def operator(name: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """Decorator: register a function with typed arguments as ``simmp_fast::name``; it writes into none of its inputs.

    Args:
        name: name without the namespace.
        fake: takes the same arguments and returns empty tensors of the right shape, dtype and device.
    """

    def wrap(function: Callable[..., Any]) -> CustomOpDef:
        defined = torch.library.custom_op(f"{NAMESPACE}::{name}", function, mutates_args=())
        defined.register_fake(fake)
        return defined

    return wrap


def autograd(defined: CustomOpDef, setup: Callable[..., None], backward: Callable[..., Any]) -> None:
    """Register the gradient of an operator; `backward` calls another operator, so that it is traceable too."""
    defined.register_autograd(backward, setup_context=setup)


def autocast(name: str, rule: Callable[..., Any]) -> None:
    """Register what ``simmp_fast::name`` does where autocast is on.

    Args:
        name: name without the namespace.
        rule: takes the autocast dtype, then the operator's arguments, all positional; it is called with autocast off
            and calls the operator again with arguments of the dtypes it wants.
    """
    for device, key in _AUTOCAST_DEVICES.items():

        def kernel(*args: Any, _device: str = device) -> Any:
            dtype = torch.get_autocast_dtype(_device)
            with torch.autocast(_device, enabled=False):
                return rule(dtype, *args)

        _library.impl(name, kernel, key)


def flops(name: str, formula: Callable[..., int]) -> None:
    """Register the operation count of ``simmp_fast::name``; the formula gets shapes in place of tensors."""
    register_flop_formula(getattr(torch.ops.simmp_fast, name))(formula)


def lower(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` as autocast passes it to a product: float32 and half tensors in `dtype`, others as they are."""
    return x.to(dtype) if x.dtype in (torch.float32, torch.float16, torch.bfloat16) else x
