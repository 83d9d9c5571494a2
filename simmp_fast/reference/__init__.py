"""The definition of every operator in plain PyTorch, written to be read beside the mathematics.

What the text names is materialised; nothing is optimised. Any device, float64 included. In a half dtype an operator
does what eager PyTorch under autocast does: products in that dtype, softmax in float32, probabilities cast back.
"""

from .assign_clusters import assign_clusters
from .context_attention import context_attention
from .decay_weights import decay_weights
from .memory_attention import memory_attention, memory_context_attention
from .powerset_loss import powerset_loss
from .split_attention import split_attention, split_threshold
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
