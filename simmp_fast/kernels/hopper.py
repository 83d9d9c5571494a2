"""Two faults of the compilers in Triton before 3.7 on Hopper, and what is done about them here.

`wgmma` reads shared memory by another proxy than the one that `cp.async` writes it by: between the two there has to be
a ``fence.proxy.async``, or a product may read what was there before. Triton 3.6 puts none into its pipelined loops
(Triton's issue 9610, mended in 3.7). Here each thread that has waited for its copies passes the fence before it meets
the others at the barrier that follows. It costs no register.

The ptxas 12.8 that Triton 3.6 takes for Hopper puts a wrong register into the descriptor of a shared operand: on an
H100 the attention kernels read elsewhere at every length that is not a multiple of their tile, or faulted. The same
wheel has a newer one for Blackwell, which assembles the same PTX rightly; it is taken instead, unless
``TRITON_PTXAS_PATH`` names one. `descriptors` looks for that fault in machine code.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import triton

VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
NEEDED = VERSION < (3, 7)
CHOSEN = "TRITON_PTXAS_PATH"
_WAIT = re.compile(r"(cp\.async\.wait_group\s+\d+;)")
Stage = Callable[[Any, Any], Any]


def with_fences(ptx: str) -> str:
    """PTX with a fence after each wait for copies."""
    return _WAIT.sub(r"\1\n\tfence.proxy.async.shared::cta;", ptx)


def newer_assembler(assemble: Stage) -> Stage:
    """A compiler's last stage, with the assembler that the wheel has for Blackwell."""

    def assembled(ptx: Any, metadata: Any) -> Any:
        tools = triton.knobs.nvidia
        if os.environ.get(CHOSEN):
            return assemble(ptx, metadata)
        with tools.scope():
            tools.ptxas = tools.ptxas_blackwell.path
            return assemble(ptx, metadata)

    return assembled


def _hook(before: Callable[..., Any] | None) -> Callable[..., None]:
    """A hook of Triton's compiler, in the form that it has before 3.7, which also calls the one that was there."""

    def hook(backend: Any, stages: dict[str, Any], options: Any, language: Any, capability: int | None) -> None:
        if before is not None:
            before(backend, stages, options, language, capability)
        if capability is not None and capability // 10 == 9:
            emit = stages["ptx"]
            stages["ptx"] = lambda source, metadata: with_fences(emit(source, metadata))
            stages["cubin"] = newer_assembler(stages["cubin"])

    return hook


@contextlib.contextmanager
def mended() -> Iterator[None]:
    """Kernels that are compiled meanwhile are spared their compiler's faults; from Triton 3.7 on nothing is done."""
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
