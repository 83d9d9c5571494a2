"""Attention of a token to the slots of its cluster (section 2)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..validation import check_bank, check_context_attention, spoiled, within
from .assign_clusters import assign_clusters
from .context_attention import context_attention
from .precision import softmax_rows


def memory_attention(
    query: Tensor, memory: Tensor, prototypes: Tensor, cluster: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``mem_i = sum_m softmax_m(query_i . memory[c_i, m]) memory[c_i, m]`` with ``c_i`` the cluster of token i.

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
    slots = memory.detach().to(query.dtype)[cluster]
    scores = torch.einsum("bnd,bnmd->bnm", query, slots)
    return torch.einsum("bnm,bnmd->bnd", softmax_rows(scores), slots)


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
