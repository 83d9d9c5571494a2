"""Attention of a token to the slots of its cluster (section 2)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..validation import check_bank, check_context_attention, product_dtype, spoiled, within
from .assign_clusters import assign_clusters
from .context_attention import context_attention
from .precision import at_least_float32
from .tiles import from_tiles, tile_layout, to_tiles

# Features in a part of a float32 score's sum. The definition's products are small and add in many lanes; one long run
# of a batched product rounds up to five times as much (D = 130).
PART = 64


def memory_attention(
    query: Tensor, memory: Tensor, prototypes: Tensor, cluster: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``mem_i = sum_m softmax_m(query_i . memory[c_i, m]) memory[c_i, m]`` with ``c_i`` the cluster of token i.

    Tokens are grouped by cluster in tiles, and each tile meets the slots of its one cluster in two batched products:
    the operations needed and no more, slots gathered once a tile and not once a token.

    Args:
        query: ``[B, N, D]``, floating.
        memory: ``[K, M, D]``, floating; a constant to autograd, taken in the dtype of `query`.
        prototypes: ``[K, D]`` in the dtype of `memory`.
        cluster: ``[B, N]`` int64 in ``[0, K)`` fixes the assignment, a token with another one gets NaN, in the gradient
            too; None matches by cosine.

    Returns:
        output ``[B, N, D]`` in the dtype of `query` (of autocast, where it is on), and cluster ``[B, N]`` int64.
        The gradient reaches `query` alone.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or device.
    """
    check_bank("query", query, memory, prototypes, cluster)
    if cluster is None:
        cluster = assign_clusters(query, prototypes)
        return _attend(query, memory, cluster), cluster
    owner, known = within(cluster, memory.shape[0])
    return spoiled(_attend(query, memory, owner), query, known), cluster


def _attend(query: Tensor, memory: Tensor, cluster: Tensor) -> Tensor:
    tiles = tile_layout(cluster.reshape(-1), memory.shape[0])
    slots = memory.detach().to(query.dtype)[tiles.owner]
    rows = to_tiles(query.reshape(-1, query.shape[-1]), tiles)
    part = PART if product_dtype(rows) == torch.float32 else rows.shape[-1]
    parts = [torch.bmm(q, s.mT) for q, s in zip(rows.split(part, -1), slots.split(part, -1), strict=True)]
    scores = torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]
    weights = at_least_float32(scores).softmax(-1).to(scores.dtype)
    return from_tiles(torch.bmm(weights, slots), tiles).view(query.shape)


def memory_context_attention(
    query: Tensor, key: Tensor, value: Tensor, memory: Tensor, prototypes: Tensor, cluster: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The sum of `context_attention` and `memory_attention`: all that a DMW-LA block adds before its projection.

    Args:
        query, key, value: ``[B, N, D]``, one floating dtype.
        memory: ``[K, M, D]``, floating; a constant to autograd, taken in the dtype of `query`.
        prototypes: ``[K, D]`` in the dtype of `memory`.
        cluster: ``[B, N]`` int64 in ``[0, K)`` fixes the assignment, a token with another one gets NaN, in the gradient
            too; None matches by cosine.

    Returns:
        output ``[B, N, D]`` in the dtype of `query` (of autocast, where it is on), and cluster ``[B, N]`` int64.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or device.
    """
    check_context_attention(query, key, value)
    recalled, cluster = memory_attention(query, memory, prototypes, cluster)
    return context_attention(query, key, value) + recalled, cluster
