"""The one door to the operators: every call names its backend, checks it can run here, and goes there.

`reference` is the definition, `portable` fast PyTorch for any device, `triton` the fused kernels for NVIDIA GPUs.
`auto` takes Triton on CUDA tensors that the kernels support, portable elsewhere, and says once in the log why where a
CUDA tensor falls to portable.
Asking for a backend that cannot run is an error that says why; nothing falls back in silence.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from . import portable, reference
from .config import BACKENDS

logger = logging.getLogger(__name__)

_IMPLEMENTATIONS: dict[str, ModuleType] = {"reference": reference, "portable": portable}
# What the kernels hold at once bounds these sizes: channels of a head, clusters of a bank, classes of the loss.
WIDEST_HEAD, MOST_CLUSTERS, MOST_CLASSES = 256, 64, 32
_UNTRIED = (
    "backend 'auto' takes the Triton kernels, which pass every test that needs no GPU and have not run on one yet "
    "(docs/environment.md); backend 'portable' does without them"
)


class BackendError(RuntimeError):
    """A backend was asked for that cannot run: says which, on what, and why."""


@torch.compiler.assume_constant_result
@functools.cache
def _triton_missing() -> str | None:
    """Why the kernels cannot run in this installation, whatever the device; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    return None


@torch.compiler.assume_constant_result
@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


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
    major, minor = _capability(device.index if device.index is not None else torch.cuda.current_device())
    if major < 8:
        return f"the GPU has compute capability {major}.{minor}, the kernels need 8.0 or newer"
    return None


@functools.cache
def _log_once(message: str) -> None:
    logger.warning(message)


def choose_backend(
    backend: str, device: torch.device, dtype: torch.dtype = torch.float32, too_large: str | None = None
) -> str:
    """The backend that a call with `backend` takes on tensors of this device and dtype.

    Args:
        backend: one of `BACKENDS`.
        device, dtype: of the tensors.
        too_large: what the kernels cannot hold of these tensors, in words; None if they can.

    Raises:
        ValueError: `backend` is no backend's name.
        BackendError: the backend cannot run on these tensors, or is not part of this installation.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}, expected one of {', '.join(map(repr, BACKENDS))}")
    if backend in ("reference", "portable"):
        return backend
    reason = why_not_triton(device, dtype) or too_large
    if backend == "triton" and reason is not None:
        raise BackendError(f"backend: 'triton' cannot run here: {reason}")
    if device.type == "cuda" and backend == "auto" and not torch.compiler.is_compiling():
        _log_once(f"backend 'auto' takes portable: {reason}" if reason else _UNTRIED)
    return "triton" if reason is None else "portable"


def _implementation(backend: str, tensor: Tensor, too_large: str | None = None) -> ModuleType:
    return _module(choose_backend(backend, tensor.device, tensor.dtype, too_large))


def _module(name: str) -> ModuleType:
    if name == "triton":
        from . import kernels  # by the first call that takes them: Triton may not be installed

        return kernels
    return _IMPLEMENTATIONS[name]


def _wide(tokens: Tensor, prototypes: Tensor | None = None) -> str | None:
    """Why the kernels cannot hold these tokens or this bank; None if they can."""
    if tokens.dim() == 3 and tokens.shape[-1] > WIDEST_HEAD:
        return f"got {tokens.shape[-1]} channels a token, the kernels take at most {WIDEST_HEAD}"
    if prototypes is not None and prototypes.dim() == 2 and prototypes.shape[0] > MOST_CLUSTERS:
        return f"got {prototypes.shape[0]} clusters, the kernels take at most {MOST_CLUSTERS}"
    return None


def assign_clusters(query: Tensor, prototypes: Tensor, *, metric: str = "cosine", backend: str = "auto") -> Tensor:
    """The cluster of every token; see `simmp_fast.reference.assign_clusters`."""
    return _implementation(backend, query, _wide(query, prototypes)).assign_clusters(query, prototypes, metric=metric)


def context_attention(query: Tensor, key: Tensor, value: Tensor, *, backend: str = "auto") -> Tensor:
    """Unscaled attention among the tokens of an image; see `simmp_fast.reference.context_attention`."""
    return _implementation(backend, query, _wide(query)).context_attention(query, key, value)


def memory_attention(
    query: Tensor, memory: Tensor, prototypes: Tensor, cluster: Tensor | None = None, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Attention of a token to the slots of its cluster; see `simmp_fast.reference.memory_attention`."""
    implementation = _implementation(backend, query, _wide(query, prototypes))
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
    implementation = _implementation(backend, query, _wide(query, prototypes))
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
    implementation = _implementation(backend, tokens, _wide(tokens, prototypes))
    return implementation.update_memory(tokens, memory, prototypes, k, rate=rate, cluster=cluster)


def window_similarity(x: Tensor, window: int, *, backend: str = "auto") -> Tensor:
    """Sum of cosines in every window of a feature map; see `simmp_fast.reference.window_similarity`."""
    return _implementation(backend, x).window_similarity(x, window)


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
    return _implementation(backend, score).decay_weights(score, grid, window, gamma, variant, dtype)


def split_threshold(query: Tensor, key: Tensor, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Row means and far-set thresholds; see `simmp_fast.reference.split_threshold`."""
    return _implementation(backend, query).split_threshold(query, key)


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
    implementation = _implementation(backend, query)
    return implementation.split_attention(query, key, value, row_mean, threshold, variant=variant)


def loss_backend(heads: Sequence[Tensor], label: Tensor, backend: str = "auto") -> str:
    """The backend that `powerset_loss` takes; raises as `choose_backend`."""
    first = heads[0] if heads else label
    many = heads and first.dim() == 4 and first.shape[1] > MOST_CLASSES
    too_large = f"got {first.shape[1]} classes, the kernels take at most {MOST_CLASSES}" if many else None
    return choose_backend(backend, first.device, first.dtype, too_large)


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
