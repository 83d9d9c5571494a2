"""The operators as fused Triton kernels, forward and backward, for NVIDIA GPUs from sm_80 on.

Importing this package imports Triton; `simmp_fast.ops` does so on first use alone. Outputs and gradients are
deterministic: no kernel adds floating-point numbers atomically.
"""

from __future__ import annotations

from .assign_clusters import assign_clusters
from .attention import context_attention, memory_attention, memory_context_attention
from .configs import MEASURED, register_table
from .keys import settle_keys
from .powerset_loss import powerset_loss
from .split_attention import split_attention
from .split_threshold import split_threshold
from .update_memory import update_memory
from .window_similarity import decay_weights, window_similarity

register_table(MEASURED.read_text(encoding="utf-8"))
settle_keys(__name__)

__all__ = [
    "assign_clusters",
    "context_attention",
    "decay_weights",
    "memory_attention",
    "memory_context_attention",
    "powerset_loss",
    "split_attention",
    "split_threshold",
    "update_memory",
    "window_similarity",
]
