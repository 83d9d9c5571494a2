"""Whether interpreted kernels read and write within the tensors that they were given, as memcheck does on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import numpy as np
import torch
from triton.runtime.interpreter import InterpreterBuilder

# Of the launch that is running: its name, and the addresses of each tensor's first byte and of the byte past its last.
_running: tuple[str, list[tuple[int, int]]] | None = None


@contextmanager
def within(kernel: str, arguments: Iterable[Any]) -> Iterator[None]:
    """Meanwhile `kernel` may touch the tensors among its arguments, and no byte beside them."""
    global _running
    ranges = []
    for tensor in chain.from_iterable(each if isinstance(each, tuple) else (each,) for each in arguments):
        if isinstance(tensor, torch.Tensor) and tensor.numel():
            last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
            ranges.append((tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()))
    _running = kernel, ranges
    try:
        yield
    finally:
        _running = None


def _check(pointers: Any, mask: Any) -> None:
    if _running is None:
        return
    kernel, ranges = _running
    touched = pointers.data[mask.data]
    if not touched.size:
        return
    size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
    low, high = int(touched.min()), int(touched.max()) + size
    if any(start <= low and high <= end for start, end in ranges):
        return
    inside = np.zeros(touched.shape, bool)
    for start, end in ranges:
        inside |= (touched >= start) & (touched + size <= end)
    if not inside.all():
        raise AssertionError(f"{kernel} touches {(~inside).sum()} elements outside of its tensors")


@contextmanager
def checked() -> Iterator[None]:
    """Meanwhile every load and store of a launch `within` its tensors is checked."""
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def checked_load(self: Any, pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        _check(pointers, mask)
        return load(self, pointers, mask, *rest, **named)

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        _check(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    InterpreterBuilder.create_masked_load = checked_load
    InterpreterBuilder.create_masked_store = checked_store
    try:
        yield
    finally:
        InterpreterBuilder.create_masked_load = load
        InterpreterBuilder.create_masked_store = store


def around(launch: Callable[..., None]) -> Callable[..., None]:
    """The launch of a kernel, within its tensors."""

    def call(kernel: Any, grid: Any, config: Any, device: Any, *rest: Any, **named: Any) -> None:
        with within(config.kernel, [*rest, *named.values()]):
            launch(kernel, grid, config, device, *rest, **named)

    return call
