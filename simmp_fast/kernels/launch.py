"""What every launch shares: the tensors' own device, strides and alignment, the interpreter's limits, product
precision.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from .configs import Config
from .hopper import mended

# Triton 3.10 changes the default; the parity figures belong to fused multiply-adds.
FP_FUSION = True


def interpreted() -> bool:
    """Whether Triton runs its interpreter (TRITON_INTERPRET=1 at its import): kernels then take CPU tensors."""
    return bool(triton.knobs.runtime.interpret)


def check_launchable(**tensors: Tensor | None) -> None:
    """Raise unless these tensors can go to a kernel: CUDA, or anything but bfloat16 and float64 under the interpreter.

    Raises:
        ValueError: a tensor lies where the kernels cannot run.
        TypeError: float64, or bfloat16 under the interpreter, whose products of bfloat16 are wrong without an error.
    """
    for name, value in tensors.items():
        if value is None:
            continue
        if value.dtype == torch.float64:
            raise TypeError(f"{name}: got dtype torch.float64, expected float32, bfloat16 or float16 (Triton kernels)")
        if interpreted():
            if value.dtype == torch.bfloat16:
                raise TypeError(
                    f"{name}: got dtype torch.bfloat16 under TRITON_INTERPRET=1, expected float32 or float16: "
                    "the interpreter multiplies bfloat16 wrongly"
                )
        elif value.device.type != "cuda":
            raise ValueError(
                f"{name}: got device {value.device}, expected a CUDA device (or TRITON_INTERPRET=1 to test on a CPU)"
            )


def dtype_class(dtype: torch.dtype) -> str:
    """The table's dtype class: "half" for bfloat16 and float16; "tf32" or "float32" as PyTorch's products are set."""
    if dtype in (torch.bfloat16, torch.float16):
        return "half"
    # The newer of PyTorch's two settings: it follows the older one, which raises once the newer was used.
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "float32"


def dot_precision(dtype: str) -> str:
    """`input_precision` of `tl.dot` for a dtype class: it matters for float32 operands alone."""
    return "tf32" if dtype == "tf32" else "ieee"


def rows_contiguous(x: Tensor) -> Tensor:
    """`x` if its last dimension is contiguous, its rows do not overlap and are small steps apart; else a copy.

    Kernels step over leading dimensions by stride, so slices of a fused projection pass as they are. A last dimension
    that is strided (channels-last seen as tokens) or expanded (the gradient of a sum) would be read once per tile in
    scattered words: one copy is cheaper. Steps of 2**22 elements and more are copied as well, so that offsets inside a
    tile fit 32 bits; offsets between tiles are 64-bit.
    """
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        return x.contiguous()
    if any(step >= 2**22 for step in x.stride()[1:]):
        return x.contiguous()
    return x


def launch(kernel: Any, grid: Sequence[int], config: Config, device: torch.device, *args: Any, **kwargs: Any) -> None:
    """Run `kernel` over `grid` on `device` with a pinned configuration; tile sizes go in as keyword arguments.

    An empty grid launches nothing. `args` and `kwargs` are the kernel's own arguments.
    """
    if 0 in grid:
        return
    guard = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with guard, mended():
        compiled = kernel[tuple(grid)](
            *args,
            **kwargs,
            **config.tiles,
            num_warps=config.warps,
            num_stages=config.stages,
            enable_fp_fusion=FP_FUSION,
        )
    if _WATCHED is not None:
        _WATCHED[config.kernel] = compiled


_WATCHED: dict[str, Any] | None = None


@contextlib.contextmanager
def watched() -> Iterator[dict[str, Any]]:
    """The compiled kernels that are launched meanwhile, by their names in the table; for `tune`."""
    global _WATCHED
    _WATCHED = {}
    try:
        yield _WATCHED
    finally:
        _WATCHED = None
