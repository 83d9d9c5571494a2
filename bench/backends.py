"""Who is measured. A backend is a door of `simmp_fast.ops`, eager or under `torch.compile`, or PyTorch's own SDPA."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from simmp_fast.config import ConfigError
from simmp_fast.ops import why_not_triton

from .cases import STEP

BASELINE = "reference"


@dataclass(frozen=True)
class Backend:
    """One of the contenders.

    Attributes:
        name: as rows and options spell it.
        door: backend of `simmp_fast.ops`, or "sdpa".
        compiled: under `torch.compile`.
        channels_last: the training step with the channels innermost.
        replayed: the training step replayed from a CUDA graph.
        attention: the implementation that PyTorch's SDPA is held to, a name in `SDPBackend`; its own choice by default.
        usual: whether it is measured without being asked for by name.
    """

    name: str
    door: str
    compiled: bool = False
    channels_last: bool = False
    replayed: bool = False
    attention: str = ""
    usual: bool = True

    def takes(self, operator: str) -> bool:
        """Whether it implements `operator`."""
        if self.channels_last or self.replayed:
            return operator == STEP
        return self.door != "sdpa" or operator == "context_attention"

    def missing(self, device: torch.device) -> str | None:
        """Why it cannot run on a device; None if it can."""
        if self.door == "triton":
            return why_not_triton(device)
        if self.attention and device.type != "cuda":
            return f"the tensors are on {device.type}, this attention needs a CUDA device"
        return None


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("reference", "reference"),
        Backend("reference-compiled", "reference", compiled=True),
        Backend("portable", "portable"),
        Backend("portable-compiled", "portable", compiled=True),
        Backend("sdpa", "sdpa"),
        Backend("sdpa-flash", "sdpa", attention="FLASH_ATTENTION"),
        Backend("sdpa-cudnn", "sdpa", attention="CUDNN_ATTENTION"),
        Backend("triton", "triton"),
        Backend("triton-compiled", "triton", compiled=True, usual=False),
        Backend("triton-channels-last", "triton", channels_last=True, usual=False),
        Backend("triton-graph", "triton", replayed=True, usual=False),
        Backend("triton-fast", "triton", compiled=True, channels_last=True, replayed=True),
    )
}


def choose(
    names: Sequence[str], device: torch.device, operator: str, compiled: bool, baseline: bool = True
) -> list[Backend]:
    """The backends to measure for `operator`, the baseline first: speed-ups are ratios to it.

    Args:
        names: asked for by name; all that can run here by default.
        device: where.
        operator: for which.
        compiled: whether the compiled forms are among the default ones.
        baseline: whether it is measured where it is not asked for by name.

    Raises:
        ConfigError: an unknown name, or kernels where they cannot run.
    """
    unknown = [name for name in names if name not in BACKENDS]
    if unknown:
        raise ConfigError(f"--backend: got {unknown[0]!r}, expected some of {', '.join(BACKENDS)}")
    for name in names:
        reason = BACKENDS[name].missing(device)
        if reason is not None:
            raise ConfigError(f"--backend: {name!r} cannot run here: {reason}")
    wanted = set(names) | ({BASELINE} if baseline else set())
    if not names:
        usual = [b for b in BACKENDS.values() if b.usual and (compiled or not b.compiled)]
        wanted = {b.name for b in usual if b.missing(device) is None and (baseline or b.name != BASELINE)}
    return [backend for backend in BACKENDS.values() if backend.name in wanted and backend.takes(operator)]


def one(name: str, device: torch.device, operator: str) -> Backend:
    """The backend of that name.

    Raises:
        ConfigError: an unknown name, or what cannot run here or has no such operator.
    """
    found = choose([name], device, operator, compiled=True, baseline=False)
    if not found:
        raise ConfigError(f"--backend: got {name!r}, which has no {operator}")
    return found[0]


def sdpa(attention: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """`context_attention` by one call of PyTorch's attention.

    Args:
        attention: a name in `SDPBackend`, which then takes the call or raises; "" leaves the choice to PyTorch.
    """

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        held = sdpa_kernel(getattr(SDPBackend, attention)) if attention else contextlib.nullcontext()
        query, key, value = (x.unsqueeze(1) for x in (query, key, value))
        with held:
            return F.scaled_dot_product_attention(query, key, value, scale=1.0).squeeze(1)

    return call


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` under `torch.compile`, for the shapes of one case."""
    return torch.compile(function, dynamic=False)
