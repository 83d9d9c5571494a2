"""The operators in fast PyTorch without Triton: CPUs, other GPUs, `torch.compile` and export.

Same names, signatures and results as the definition. No operator waits for the device or makes a shape depend on data:
sizes that depend on data are replaced by bounds and masks. Loops over chunks, whose number would bloat a traced graph,
are `torch.library` operators (``simmp_fast::portable_*``) with their own backward: one node each. Exported programs
take the plain path, so that they run without this package; the loss alone has none.
"""

from .assign_clusters import assign_clusters
from .context_attention import context_attention
from .decay_weights import decay_weights
from .memory_attention import memory_attention, memory_context_attention
from .powerset_loss import powerset_loss
from .split_attention import split_attention
from .split_threshold import split_threshold
from .update_memory import update_memory
from .window_similarity import window_similarity

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
