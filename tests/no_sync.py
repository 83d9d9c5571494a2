"""Modes that watch the calls of an operator: one refuses what makes the host wait for the device, one measures tensors.

On a machine without a GPU nothing really waits, so the first mode judges the calls: reading a number, shapes that
depend on data, and copies from one device to another. Under it, tensors of a device that this machine lacks may be fake
ones (`torch._subclasses.FakeTensorMode`); real CPU tensors show what the bodies of operators written in Python call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# By the name of the operator, all overloads.
REFUSED = {
    "_local_scalar_dense": "reads a number from the device (item, int, float, bool)",
    "item": "reads a number from the device",
    "is_nonzero": "reads a number from the device",
    "equal": "compares on the device and reads the answer",
    "allclose": "compares on the device and reads the answer",
    "nonzero": "has a shape that depends on data",
    "argwhere": "has a shape that depends on data",
    "masked_select": "has a shape that depends on data",
    "unique_consecutive": "has a shape that depends on data",
    "unique_dim": "has a shape that depends on data",
    "_unique": "has a shape that depends on data",
    "_unique2": "has a shape that depends on data",
    "bincount": "has a shape that depends on data",
    "repeat_interleave": "has a shape that depends on data",
}
BOOLEAN_INDEX = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put")
COPIES = ("_to_copy", "copy_", "copy", "_copy_from", "lift_fresh_copy")


class HostSyncError(AssertionError):
    """An operator made the host wait for the device."""


def python_body(func: Any, tensors: list[Tensor]) -> Callable[..., Any] | None:
    """The Python function behind an operator of `torch.library.custom_op`; None for others, and for fake tensors."""
    operator = OPDEFS.get(func.overloadpacket._qualified_op_name)
    if operator is None or any(isinstance(tensor, FakeTensor) for tensor in tensors):
        return None
    return operator._init_fn


class NoHostSync(TorchDispatchMode):
    """Raises `HostSyncError` on the first call that would make the host wait for the device.

    Enters operators written in Python (`torch.library.custom_op`), which a dispatch mode sees as one call each.
    """

    def __torch_dispatch__(
        self, func: Any, types: tuple, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        _judge(func, args, kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        body = python_body(func, tensors)
        if body is not None:
            with self:
                return body(*args, **kwargs)
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name in COPIES:
            devices = {leaf.device.type for leaf in [*tensors, *tree_leaves(result)] if isinstance(leaf, Tensor)}
            if len(devices) > 1:
                raise HostSyncError(f"{func}: copies between {' and '.join(sorted(devices))}")
        return result


def _judge(func: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    name = func.overloadpacket.__name__
    if func.namespace == "aten" and name in REFUSED:
        counted = name == "repeat_interleave" and kwargs.get("output_size") is not None
        if not counted:
            raise HostSyncError(f"{func}: {REFUSED[name]}")
    if name in BOOLEAN_INDEX:
        indices = [leaf for leaf in tree_leaves(args[1]) if isinstance(leaf, Tensor)]
        if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
            raise HostSyncError(f"{func}: indexes with a mask, the shape depends on data")


class LargestTensor(TorchDispatchMode):
    """Records the most elements of any tensor that an operator returns while the mode is on."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(
        self, func: Any, types: tuple, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        body = python_body(func, [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)])
        if body is not None:
            with self:
                return body(*args, **kwargs)
        result = func(*args, **kwargs)
        sizes = [
            leaf.untyped_storage().nbytes() // leaf.itemsize for leaf in tree_leaves(result) if isinstance(leaf, Tensor)
        ]
        self.elements = max([self.elements, *sizes])
        return result
