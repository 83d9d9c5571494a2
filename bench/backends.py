"""Who is measured. A backend is a door of `simmp_fast.ops`, eager or under `torch.compile`, or PyTorch's own SDPA."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

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
        usual: whether it is measured without being asked for by name.
    """

    name: str
    door: str
    compiled: bool = False
    channels_last: bool = False
    replayed: bool = False
    usual: bool = True

    def takes(self, operator: str) -> bool:
        """Whether it implements `operator`."""
        if self.channels_last or self.replayed:
            return operator == STEP
        return self.door != "sdpa" or operator == "context_attention"


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("reference", "reference"),
        Backend("reference-compiled", "reference", compiled=True),
        Backend("portable", "portable"),
        Backend("portable-compiled", "portable", compiled=True),
        Backend("sdpa", "sdpa"),
        Backend("triton", "triton"),
        Backend("triton-compiled", "triton", compiled=True, usual=False),
        Backend("triton-channels-last", "triton", channels_last=True, usual=False),
        Backend("triton-graph", "triton", replayed=True, usual=False),
        Backend("triton-fast", "triton", compiled=True, channels_last=True, replayed=True),
    )
}


def choose(names: Sequence[str], device: torch.device, operator: str, compiled: bool) -> list[Backend]:
    """The backends to measure for `operator`, the baseline first: speed-ups are ratios to it.

    Args:
        names: asked for by name; all that can run here by default.
        device: where.
        operator: for which.
        compiled: whether the compiled forms are among the default ones.

    Raises:
        ConfigError: an unknown name, or kernels where they cannot run.
    """
    unknown = [name for name in names if name not in BACKENDS]
    if unknown:
        raise ConfigError(f"--backend: got {unknown[0]!r}, expected some of {', '.join(BACKENDS)}")
    reason = why_not_triton(device)
    asked = next((name for name in names if BACKENDS[name].door == "triton"), None)
    if asked is not None and reason is not None:
        raise ConfigError(f"--backend: {asked!r} cannot run here: {reason}")
    wanted = set(names) | {BASELINE}
    if not names:
        usual = [b for b in BACKENDS.values() if b.usual and (compiled or not b.compiled)]
        wanted = {b.name for b in usual if reason is None or b.door != "triton"}
    return [backend for backend in BACKENDS.values() if backend.name in wanted and backend.takes(operator)]


def plain_sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """`context_attention` by one call of PyTorch's attention."""
    query, key, value = (x.unsqueeze(1) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, scale=1.0).squeeze(1)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` under `torch.compile`, for the shapes of one case."""
    return torch.compile(function, dynamic=False)
