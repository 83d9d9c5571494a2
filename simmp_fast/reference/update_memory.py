"""The update of the memory bank by the tokens of a training step (section 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..validation import check_update_memory, nan_unless, within
from .assign_clusters import assign_clusters
from .precision import at_least_float32


def _representativeness(rows: Tensor) -> Tensor:
    """``[n, D] -> [n]``: softmax over the rows, one channel at a time, summed over the channels."""
    return rows.softmax(0).sum(-1)


@torch.no_grad()
def update_memory(
    tokens: Tensor,
    memory: Tensor,
    prototypes: Tensor,
    k: int | Tensor,
    *,
    rate: float = 0.3,
    cluster: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Write the `k` most representative tokens of each cluster over its `k` least representative slots.

    Slot scores rise, token scores fall, ties go to the lower index, and the pairs are written in that order:
    ``slot <- (1 - rate) * slot + rate * token``. Fewer than `k` tokens are repeated cyclically. A cluster without
    tokens keeps its slots. Prototypes become the slot means.

    Args:
        tokens: ``[B, N, D]``, floating.
        memory: ``[K, M, D]``, floating.
        prototypes: ``[K, D]`` in the dtype of `memory`, as they were before the step.
        k: slots to write, 1 to M; a 0-d integer tensor is clamped to that range.
        rate: weight of the token.
        cluster: ``[B, N]`` int64 in ``[0, K)`` fixes the assignment, one outside makes both results NaN; None matches
            by dot product.

    Returns:
        memory ``[K, M, D]`` and prototypes ``[K, D]``, new tensors in the dtype of `memory`.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or device, or an int `k` outside 1..M.
    """
    check_update_memory(tokens, memory, prototypes, k, rate, cluster)
    clusters, slots, dim = memory.shape
    width = min(max(int(k), 1), slots)
    if cluster is None:
        cluster = assign_clusters(tokens, prototypes, metric="dot")
    flat, (owner, known) = tokens.reshape(-1, dim), within(cluster.reshape(-1), clusters)
    updated = at_least_float32(memory).clone()
    for c in range(clusters):
        members = flat[owner == c].to(updated.dtype)
        if len(members) == 0:
            continue
        if len(members) < width:
            members = members[torch.arange(width, device=members.device) % len(members)]
        oldest = _representativeness(updated[c]).argsort(stable=True)[:width]
        newest = _representativeness(members).argsort(stable=True, descending=True)[:width]
        updated[c, oldest] = (1 - rate) * updated[c, oldest] + rate * members[newest]
    updated *= nan_unless(known.all(), updated)
    return updated.to(memory.dtype), updated.mean(1).to(memory.dtype)
