"""Two faults of the compilers in Triton on Hopper, and what is done about them here.

`wgmma` reads shared memory by another proxy than the one that `cp.async` writes it by: between the two there has to be
a ``fence.proxy.async``, or a product may read what was there before. Triton 3.6 puts none into its pipelined loops
(Triton's issue 9610, mended in 3.7). Here each thread that has waited for its copies passes the fence before it meets
the others at the barrier that follows. It costs no register.

The ptxas 12.8 that Triton 3.6 and 3.7 take for Hopper puts a wrong register into the descriptor of a shared operand.
On an H100 the attention kernels then read elsewhere, or faulted, at lengths that are not a multiple of their tile. The
same wheel has a newer one for Blackwell, which assembles the same PTX rightly; it is taken instead, also of one that
``TRITON_PTXAS_PATH`` names, which Inductor sets to PyTorch's own. `descriptors` looks for that fault in machine code.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import triton

VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
FENCES_NEEDED = VERSION < (3, 7)
# The first ptxas that is right, by its major and minor version.
RIGHT = (12, 9)
CHOSEN = "TRITON_PTXAS_PATH"
# From Triton 3.7 on a hook that is called without arguments says what it adds to the keys of compiled kernels.
_KEY = "simmp_fast.kernels.hopper"
_WAIT = re.compile(r"(cp\.async\.wait_group\s+\d+;)")
Stage = Callable[[Any, Any], Any]


def with_fences(ptx: str) -> str:
    """PTX with a fence after each wait for copies."""
    return _WAIT.sub(r"\1\n\tfence.proxy.async.shared::cta;", ptx)


@functools.cache
def _too_old(named: str | None) -> bool:
    found = tuple(int(part) for part in triton.knobs.nvidia.ptxas.version.split("."))
    return found < RIGHT


def assembler_needed() -> bool:
    """Whether the ptxas that Triton takes for Hopper is too old; a process may name another one while it runs."""
    return _too_old(os.environ.get(CHOSEN))


def newer_assembler(assemble: Stage) -> Stage:
    """A compiler's last stage, with the assembler that the wheel has for Blackwell."""

    def assembled(ptx: Any, metadata: Any) -> Any:
        tools = triton.knobs.nvidia
        with tools.scope():
            tools.ptxas = tools.ptxas_blackwell.path
            return assemble(ptx, metadata)

    return assembled


def _hook(before: Callable[..., Any] | None) -> Callable[..., Any]:
    """A hook of Triton's compiler, which also calls the one that was there."""

    def hook(*arguments: Any) -> Any:
        found = before(*arguments) if before is not None else None
        if not arguments:
            key, digest = found or ("", "")
            return key + _KEY, digest + _KEY
        _, stages, _, _, capability = arguments
        if capability is not None and capability // 10 == 9:
            if FENCES_NEEDED:
                emit = stages["ptx"]
                stages["ptx"] = lambda source, metadata: with_fences(emit(source, metadata))
            if assembler_needed():
                stages["cubin"] = newer_assembler(stages["cubin"])
        return None

    return hook


@contextlib.contextmanager
def mended() -> Iterator[None]:
    """Kernels that are compiled meanwhile are spared their compilers' faults; where there are none nothing is done."""
    runtime = triton.knobs.runtime
    if runtime.interpret or not (FENCES_NEEDED or assembler_needed()):
        yield
        return
    before = runtime.add_stages_inspection_hook
    runtime.add_stages_inspection_hook = _hook(before)
    try:
        yield
    finally:
        runtime.add_stages_inspection_hook = before
