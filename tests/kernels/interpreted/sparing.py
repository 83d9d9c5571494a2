"""Triton's interpreter without two things that it repeats at every call of a device function, to the same end.

It puts its own functions into `triton.language` again, which looks through all of its members, and makes its table of
dtypes anew for every value. Together they are a third of the time of an interpreted kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import triton.language as tl
from triton.runtime import interpreter


def patched_once_a_launch(patch: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The interpreter's `_patch_lang`, which does nothing for modules that it has changed since the launch began."""
    changed: set[str] = set()

    @cache
    def modules(fn: Any) -> frozenset[str]:
        return frozenset(value.__name__ for value in fn.__globals__.values() if value is tl or value is tl.core)

    def once(fn: Any) -> Any:
        if changed and modules(fn) <= changed:
            return None  # a device function, which drops it
        launch, scope = not changed, patch(fn)
        changed.update(modules(fn))
        if launch:
            restore = scope.restore

            def restore_all() -> None:
                changed.clear()
                restore()

            scope.restore = restore_all
        return scope

    return once


def looked_up_once(np_dtype: Callable[[Any], np.dtype[Any]]) -> Callable[[Any], np.dtype[Any]]:
    """The interpreter's `_get_np_dtype` with a memory, by the elements' dtype: blocks and pointers do not hash."""
    known = cache(np_dtype)

    def of(dtype: Any) -> np.dtype[Any]:
        element = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
        return np_dtype(element) if isinstance(element, tl.pointer_type) else known(element)

    return of


def spare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpret the same, in less time."""
    monkeypatch.setattr(interpreter, "_patch_lang", patched_once_a_launch(interpreter._patch_lang))
    monkeypatch.setattr(interpreter, "_get_np_dtype", looked_up_once(interpreter._get_np_dtype))
