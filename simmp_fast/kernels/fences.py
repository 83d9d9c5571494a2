"""The proxy fence that Triton before 3.7 leaves out on Hopper.

`wgmma` reads shared memory by another proxy than the one that `cp.async` writes it by: between the two there has to be
a ``fence.proxy.async``, or a product may read what was there before. Triton 3.6 puts none into its pipelined loops
(Triton's issue 9610, mended in 3.7). Here each thread that has waited for its copies passes the fence before it meets
the others at the barrier that follows. It costs no register.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import triton

VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
NEEDED = VERSION < (3, 7)
_WAIT = re.compile(r"(cp\.async\.wait_group\s+\d+;)")


def with_fences(ptx: str) -> str:
    """PTX with a fence after each wait for copies."""
    return _WAIT.sub(r"\1\n\tfence.proxy.async.shared::cta;", ptx)


def _hook(before: Callable[..., Any] | None) -> Callable[..., None]:
    """A hook of Triton's compiler, in the form that it has before 3.7, which also calls the one that was there."""

    def hook(backend: Any, stages: dict[str, Any], options: Any, language: Any, capability: int | None) -> None:
        if before is not None:
            before(backend, stages, options, language, capability)
        if capability is not None and capability // 10 == 9:
            emit = stages["ptx"]
            stages["ptx"] = lambda source, metadata: with_fences(emit(source, metadata))

    return hook


@contextlib.contextmanager
def fenced() -> Iterator[None]:
    """Kernels that are compiled meanwhile get the fences that their compiler leaves out; from Triton 3.7 on nothing."""
    if not NEEDED:
        yield
        return
    runtime = triton.knobs.runtime
    before = runtime.add_stages_inspection_hook
    runtime.add_stages_inspection_hook = _hook(before)
    try:
        yield
    finally:
        runtime.add_stages_inspection_hook = before
