"""What the Triton kernels can hold: every limit beyond what an operator itself accepts, in one place.

The door asks here before it chooses, and takes portable where a limit is passed; the kernels ask here too and raise.
Each function takes the tensors of an operator and answers in words, or None where the kernels can take them. Arguments
that no implementation would accept are not judged: that is `validation`.

`rather_portable` is another matter: what the kernels can do, but by all that is known should not.

This module knows nothing of Triton, so the door can ask where it is not installed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .validation import transformed

# Channels of a token in attention, matching and memory update: the widest class of their tables.
HEAD_DIM = 256
# Prototypes of a bank: a tile of tokens holds its similarities to all of them in registers.
CLUSTERS = 64
# Slots of a cluster in `update_memory`, whose last kernel ranks them all in one program.
SLOTS = 2048
# Numbers in the slots of one cluster: attention steps over them in 32 bits.
CLUSTER_SIZE = 2**31 - 1
# Channels of a feature map or of DS-GIM's tokens. A window's sum is held in registers, then in a stack: at twice as
# many it is 5 KB a thread.
CHANNELS = 2**16
# Classes of the loss, and the longest side of a label: beyond it bilinear sources counted in whole numbers overflow.
CLASSES = 32
LABEL_SIDE = 32767
# Tokens of a batch (for the loss, planes of logits): launches have less than 2^31 programs, and positions in the lists
# of the memory update, a tile past the last one included, fit 32 bits.
TOKENS = 2**31 - 2**12
# Side of a window: positions in it, a tile past the last one included, fit 32 bits.
WINDOW = 46340

# Operators that `auto` leaves to portable where float32 is multiplied as float32, on every device: their kernels then
# multiply without tensor cores, on tiles whose operands come from shared memory one pair a multiply-add, and by count
# take longer than the definition's own products (docs/kernels/attention.md, "float32").
FLOAT32_TAKES_PORTABLE = frozenset(
    {"context_attention", "memory_attention", "memory_context_attention", "split_attention"}
)

# The kernels that an operator may launch, backward included, by the size that is their width in the table; those under
# "any" are asked for whatever the size.
LAUNCHES: dict[str, dict[str, tuple[str, ...]]] = {
    "assign_clusters": {"dim": ("assign_clusters",)},
    "context_attention": {"dim": ("context_forward", "context_backward_query", "context_backward_key_value")},
    "memory_attention": {"dim": ("memory_forward", "memory_backward_query", "assign_clusters")},
    "memory_context_attention": {
        "dim": (
            "memory_context_forward", "memory_context_backward_query", "context_backward_key_value", "assign_clusters",
        )
    },
    "update_memory": {"dim": ("update_assign", "update_fold", "update_score"), "slots": ("update_write",)},
    "window_similarity": {"channels": ("window_similarity",)},
    "decay_weights": {"any": ("decay_weights",)},
    "split_threshold": {
        "tokens": ("split_threshold_image",),
        "any": ("split_threshold_centre", "split_threshold_rows", "split_threshold_search"),
    },
    "split_attention": {"channels": ("split_attention_forward", "split_attention_query", "split_attention_key_value")},
    "powerset_loss": {
        "any": ("powerset_loss_sums", "powerset_loss_terms", "powerset_loss_pixels", "powerset_loss_cells")
    },
}  # fmt: skip


def rather_portable(operator: str, products: torch.dtype) -> str | None:
    """Why `auto` takes portable although the kernels can run; None if it takes them.

    Args:
        operator: its name.
        products: the dtype in which it multiplies: that of autocast where it is on.
    """
    ieee = products == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32"
    if ieee and operator in FLOAT32_TAKES_PORTABLE:
        return (
            f"{operator} in float32: by count its kernels are slower than PyTorch's products; TF32 "
            "(torch.set_float32_matmul_precision('high')) or autocast takes the kernels"
        )
    return None


def transforms() -> str | None:
    """Why the kernels cannot serve `torch.func` or forward-mode AD, where one of them is at work."""
    return "torch.func and forward-mode AD cannot look into the Triton kernels" if transformed() else None


def check(reason: str | None) -> None:
    """Raise `ValueError` with a reason of this module, if there is one: how a kernel refuses."""
    reason = transforms() or reason
    if reason is not None:
        raise ValueError(reason)


def size(x: object, axis: int) -> int:
    """A size of what validation has not seen yet; 0 where that is no tensor, or has no such axis."""
    return x.shape[axis] if isinstance(x, Tensor) and x.dim() > axis else 0


def _past(name: str, found: int, what: str, most: int) -> str | None:
    return f"{name}: got {found} {what}, expected at most {most} (Triton kernels)" if found > most else None


def float64(**tensors: Tensor) -> str | None:
    """Why the kernels cannot read one of these tensors, which may have another dtype than the call's first."""
    for name, value in tensors.items():
        if isinstance(value, Tensor) and value.dtype == torch.float64:
            return f"{name}: got dtype torch.float64, expected float32, bfloat16 or float16 (Triton kernels)"
    return None


def _tokens(name: str, tokens: Tensor, channels: int) -> str | None:
    total = size(tokens, 0) * size(tokens, 1)
    return _past(name, size(tokens, 2), "channels", channels) or _past(name, total, "tokens", TOKENS)


def assign_clusters(query: Tensor, prototypes: Tensor) -> str | None:
    """For `assign_clusters`."""
    clusters = size(prototypes, 0)
    return _tokens("query", query, HEAD_DIM) or _past("prototypes", clusters, "clusters", CLUSTERS)


def context_attention(query: Tensor) -> str | None:
    """For `context_attention`."""
    return _tokens("query", query, HEAD_DIM)


def memory_attention(query: Tensor, memory: Tensor, prototypes: Tensor) -> str | None:
    """For `memory_attention` and `memory_context_attention`."""
    held = size(memory, 1) * size(memory, 2)
    return assign_clusters(query, prototypes) or _past("memory", held, "numbers a cluster", CLUSTER_SIZE)


def update_memory(tokens: Tensor, memory: Tensor, prototypes: Tensor) -> str | None:
    """For `update_memory`."""
    return (
        _tokens("tokens", tokens, HEAD_DIM)
        or _past("prototypes", size(prototypes, 0), "clusters", CLUSTERS)
        or _past("memory", size(memory, 1), "slots a cluster", SLOTS)
    )


def window_similarity(x: Tensor, window: int) -> str | None:
    """For `window_similarity`."""
    tokens = size(x, 0) * size(x, 2) * size(x, 3)
    return (
        _past("x", size(x, 1), "channels", CHANNELS)
        or _past("x", tokens, "tokens", TOKENS)
        or (_past("window", window, "tokens a side", WINDOW) if isinstance(window, int) else None)
    )


def decay_weights(score: Tensor, grid: tuple[int, int]) -> str | None:
    """For `decay_weights`."""
    return _past("grid", size(score, 0) * grid[0] * grid[1], "tokens", TOKENS)


def split(query: Tensor) -> str | None:
    """For `split_threshold` and `split_attention`."""
    return _tokens("query", query, CHANNELS)


def powerset_loss(heads: Sequence[Tensor], label: Tensor) -> str | None:
    """For `powerset_loss`, whose heads are no larger than the label."""
    if not heads:
        return None
    classes = size(heads[0], 1)
    return (
        _past("heads[0]", classes, "classes", CLASSES)
        or _past("label", size(label, 1), "rows", LABEL_SIDE)
        or _past("label", size(label, 2), "columns", LABEL_SIDE)
        or _past("heads[0]", size(heads[0], 0) * classes, "planes", TOKENS)
    )
