"""The one door to the operators: every call names its backend, checks it can run here, and goes there.

`reference` is the definition, `portable` fast PyTorch for any device, `triton` the fused kernels for NVIDIA GPUs.
`auto` takes Triton on CUDA tensors that the kernels support, portable elsewhere, and says once in the log why where a
CUDA tensor falls to portable: it never fails because a kernel has a limit (`simmp_fast.limits`).
Asking for a backend that cannot run is an error that says why; nothing falls back in silence.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor

from . import limits, portable, reference
from .config import BACKENDS
from .validation import product_dtype, transformed

logger = logging.getLogger(__name__)

_IMPLEMENTATIONS: dict[str, ModuleType] = {"reference": reference, "portable": portable}
_TAKES_KERNELS = (
    "backend 'auto' takes the Triton kernels (docs/gpu.md: what was tested on which GPU); backend 'portable' does "
    "without them"
)


class BackendError(RuntimeError):
    """A backend was asked for that cannot run: says which, on what, and why."""


# Questions about the machine are constants to `torch.compile`. The constant is a plain function around the cache:
# PyTorch 2.11 looks through a cache into what it holds, and cannot trace that.


@functools.cache
def _find_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    return None


@torch.compiler.assume_constant_result
def _triton_missing() -> str | None:
    """Why the kernels cannot run in this installation, whatever the device; None if they can."""
    return _find_triton()


@functools.cache
def _find_capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@torch.compiler.assume_constant_result
def _capability(index: int) -> tuple[int, int]:
    return _find_capability(index)


@functools.cache
def _find_unserved(
    operator: str, dtype: torch.dtype, precision: str, index: int
) -> tuple[tuple[str, str, int, float], ...]:
    from .kernels.configs import device_limits, unserved
    from .kernels.launch import dtype_class

    kind = dtype_class(dtype)  # follows `precision`, which is named so that it is asked again when that changes
    return tuple(
        (kernel, name, least, most)
        for name, kernels in limits.LAUNCHES[operator].items()
        for kernel in kernels
        for least, most in unserved(kernel, kind, device_limits(index)[1])
    )


@torch.compiler.assume_constant_result
def _unserved(operator: str, dtype: torch.dtype, index: int) -> tuple[tuple[str, str, int, float], ...]:
    """Kernels of an operator for which the table has nothing that fits a device: kernel, name of its width, and the
    widths it is about, more than the first up to the second number.
    """
    precision = torch.backends.cuda.matmul.fp32_precision if dtype == torch.float32 else ""
    return _find_unserved(operator, dtype, precision, index)


def _index(device: torch.device) -> int:
    return device.index if device.index is not None else torch.cuda.current_device()


def why_not_triton(device: torch.device, dtype: torch.dtype = torch.float32) -> str | None:
    """Why the Triton kernels cannot take tensors of this device and dtype; None if they can."""
    missing = _triton_missing()
    if missing is not None:
        return missing
    if device.type != "cuda":
        return f"the tensors are on {device.type}, the kernels need a CUDA device"
    if torch.version.hip is not None:
        return "the kernels are written for NVIDIA GPUs"
    if dtype == torch.float64:
        return "the kernels take float32, bfloat16 and float16, not float64"
    major, minor = _capability(_index(device))
    if major < 8:
        return f"the GPU has compute capability {major}.{minor}, the kernels need 8.0 or newer"
    return None


@torch.compiler.assume_constant_result
def _rather_portable(operator: str, products: torch.dtype) -> str | None:
    return limits.rather_portable(operator, products)


def _why_no_room(
    operator: str, device: torch.device, dtype: torch.dtype, widths: Callable[[], dict[str, int]]
) -> str | None:
    """Why the table has nothing for these widths on this device; None if it has."""
    if device.type != "cuda":
        return None
    for kernel, name, least, most in _unserved(operator, dtype, _index(device)):
        if name == "any" or least < widths()[name] <= most:
            return f"no configuration of {kernel} fits the shared memory of {device}"
    return None


@functools.cache
def _log_once(message: str) -> None:
    logger.warning(message)


def choose_backend(
    backend: str,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    too_large: Callable[[], str | None] = lambda: None,
    *,
    operator: str | None = None,
    products: torch.dtype | None = None,
    widths: Callable[[], dict[str, int]] = dict,
) -> str:
    """The backend that a call with `backend` takes on tensors of this device and dtype.

    Args:
        backend: one of `BACKENDS`.
        device, dtype: of the tensors.
        too_large: says what the kernels cannot hold of these tensors (`simmp_fast.limits`); None if they can. Asked
            only where nothing else stands against them.
        operator: its name, for what the table of configurations has for it; None does not ask the table.
        products: dtype of its products, where that is not `dtype` (autocast).
        widths: gives the sizes of the tensors by the names of `limits.LAUNCHES`.

    Raises:
        ValueError: `backend` is no backend's name.
        BackendError: the backend cannot run on these tensors, or is not part of this installation.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}, expected one of {', '.join(map(repr, BACKENDS))}")
    if backend in ("reference", "portable"):
        return backend
    products = dtype if products is None else products
    reason = why_not_triton(device, dtype) or limits.transforms() or too_large()
    if reason is None and operator is not None:
        reason = _why_no_room(operator, device, products, widths)
    if backend == "triton" and reason is not None:
        raise BackendError(f"backend: 'triton' cannot run here: {reason}")
    if backend == "auto" and reason is None and operator is not None:
        reason = _rather_portable(operator, products)  # who asks for `triton` gets it all the same
    if device.type == "cuda" and backend == "auto" and not torch.compiler.is_compiling():
        _log_once(f"backend 'auto' takes portable: {reason}" if reason else _TAKES_KERNELS)
    return "triton" if reason is None else "portable"


def _implementation(
    backend: str,
    operator: str,
    tensor: Tensor,
    too_large: Callable[[], str | None],
    widths: Callable[[], dict[str, int]] = dict,
    *,
    autocast: bool = False,
) -> ModuleType:
    """`choose_backend` for an operator; `autocast` says that its products are taken in the dtype of autocast."""
    device, dtype = tensor.device, tensor.dtype
    products = product_dtype(tensor) if autocast and device.type == "cuda" else dtype
    return _module(
        choose_backend(backend, device, dtype, too_large, operator=operator, products=products, widths=widths)
    )


def _module(name: str) -> ModuleType:
    if name == "triton":
        from . import kernels  # by the first call that takes them: Triton may not be installed

        return kernels
    return _IMPLEMENTATIONS[name]


def assign_clusters(query: Tensor, prototypes: Tensor, *, metric: str = "cosine", backend: str = "auto") -> Tensor:
    """The cluster of every token; see `simmp_fast.reference.assign_clusters`."""
    implementation = _implementation(
        backend,
        "assign_clusters",
        query,
        lambda: limits.float64(prototypes=prototypes) or limits.assign_clusters(query, prototypes),
        lambda: {"dim": limits.size(query, 2)},
    )
    return implementation.assign_clusters(query, prototypes, metric=metric)


def context_attention(query: Tensor, key: Tensor, value: Tensor, *, backend: str = "auto") -> Tensor:
    """Unscaled attention among the tokens of an image; see `simmp_fast.reference.context_attention`."""
    implementation = _implementation(
        backend,
        "context_attention",
        query,
        lambda: limits.context_attention(query),
        lambda: {"dim": limits.size(query, 2)},
        autocast=True,
    )
    return implementation.context_attention(query, key, value)


def memory_attention(
    query: Tensor, memory: Tensor, prototypes: Tensor, cluster: Tensor | None = None, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Attention of a token to the slots of its cluster; see `simmp_fast.reference.memory_attention`."""
    implementation = _implementation(
        backend,
        "memory_attention",
        query,
        lambda: limits.float64(memory=memory) or limits.memory_attention(query, memory, prototypes),
        lambda: {"dim": limits.size(query, 2)},
        autocast=True,
    )
    return implementation.memory_attention(query, memory, prototypes, cluster)


def memory_context_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    memory: Tensor,
    prototypes: Tensor,
    cluster: Tensor | None = None,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Context plus memory attention in one call; see `simmp_fast.reference.memory_context_attention`."""
    implementation = _implementation(
        backend,
        "memory_context_attention",
        query,
        lambda: limits.float64(memory=memory) or limits.memory_attention(query, memory, prototypes),
        lambda: {"dim": limits.size(query, 2)},
        autocast=True,
    )
    return implementation.memory_context_attention(query, key, value, memory, prototypes, cluster)


def update_memory(
    tokens: Tensor,
    memory: Tensor,
    prototypes: Tensor,
    k: int | Tensor,
    *,
    rate: float = 0.3,
    cluster: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The memory bank after a training step; see `simmp_fast.reference.update_memory`."""
    implementation = _implementation(
        backend,
        "update_memory",
        tokens,
        lambda: limits.float64(memory=memory) or limits.update_memory(tokens, memory, prototypes),
        lambda: {"dim": limits.size(tokens, 2), "slots": limits.size(memory, 1)},
    )
    return implementation.update_memory(tokens, memory, prototypes, k, rate=rate, cluster=cluster)


def window_similarity(x: Tensor, window: int, *, backend: str = "auto") -> Tensor:
    """Sum of cosines in every window of a feature map; see `simmp_fast.reference.window_similarity`."""
    implementation = _implementation(
        backend,
        "window_similarity",
        x,
        lambda: limits.window_similarity(x, window),
        lambda: {"channels": limits.size(x, 1)},
    )
    return implementation.window_similarity(x, window)


def decay_weights(
    score: Tensor,
    grid: tuple[int, int],
    window: int,
    gamma: float,
    variant: str,
    dtype: torch.dtype,
    *,
    backend: str = "auto",
) -> Tensor:
    """Weights of the tokens in DS-GIM's projections; see `simmp_fast.reference.decay_weights`."""
    implementation = _implementation(backend, "decay_weights", score, lambda: limits.decay_weights(score, grid))
    return implementation.decay_weights(score, grid, window, gamma, variant, dtype)


def split_threshold(query: Tensor, key: Tensor, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Row means and far-set thresholds; see `simmp_fast.reference.split_threshold`."""
    implementation = _implementation(
        backend,
        "split_threshold",
        query,
        lambda: limits.split(query),
        lambda: {"tokens": limits.size(query, 1)},
    )
    return implementation.split_threshold(query, key)


def split_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row_mean: Tensor,
    threshold: Tensor,
    *,
    variant: str = "paper",
    backend: str = "auto",
) -> Tensor:
    """The two softmaxes over the far and the near set; see `simmp_fast.reference.split_attention`."""
    implementation = _implementation(
        backend,
        "split_attention",
        query,
        lambda: limits.split(query),
        lambda: {"channels": limits.size(query, 2)},
        autocast=True,
    )
    return implementation.split_attention(query, key, value, row_mean, threshold, variant=variant)


def loss_backend(heads: Sequence[Tensor], label: Tensor, backend: str = "auto") -> str:
    """The backend that `powerset_loss` takes; raises as `choose_backend`.

    Under `torch.func` and forward-mode AD `auto` takes the definition: the other two have a gradient of their own.
    """
    if backend == "auto" and transformed():
        return "reference"
    first = heads[0] if heads else label
    return choose_backend(
        backend, first.device, first.dtype, lambda: limits.powerset_loss(heads, label), operator="powerset_loss"
    )


def powerset_loss(
    heads: Sequence[Tensor],
    label: Tensor,
    *,
    ce_weight: float = 0.3,
    dice_weight: float = 0.7,
    smooth: float = 1e-5,
    backend: str = "auto",
) -> Tensor:
    """The loss over all subsets of the heads; see `simmp_fast.reference.powerset_loss`."""
    implementation = _module(loss_backend(heads, label, backend))
    return implementation.powerset_loss(heads, label, ce_weight=ce_weight, dice_weight=dice_weight, smooth=smooth)
