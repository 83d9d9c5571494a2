"""The attention operators: arguments, launches, registration, gradients, autocast and operation counts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import limits
from ...validation import check_bank, check_context_attention, spoiled, within
from ..assign_clusters import match_clusters
from ..configs import pick
from ..launch import check_launchable, dot_precision, dtype_class, launch, rows_contiguous
from ..matching import match_precision, padded_clusters
from ..register import autocast, autograd, flops, lower, operator
from .backward import attention_backward_key_value, attention_backward_query
from .forward import attention_forward
from .tiles import split_dim


def context_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """``ctx_i = sum_j softmax_j(query_i . key_j) value_j``, without a scale factor (section 2).

    Args:
        query, key, value: ``[B, N, D]``, one of float32, bfloat16, float16; D up to 256.

    Returns:
        ``[B, N, D]`` in the dtype of the inputs (of autocast, where it is on).

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or device.
    """
    check_context_attention(query, key, value)
    limits.check(limits.context_attention(query))
    return torch.ops.simmp_fast.context_attention(query, key, value, _wants_grad(query, key, value))[0]


def memory_attention(
    query: Tensor, memory: Tensor, prototypes: Tensor, cluster: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``mem_i = sum_m softmax_m(query_i . memory[c_i, m]) memory[c_i, m]``, ``c_i`` the cluster of token i (section 2).

    Args:
        query: ``[B, N, D]``, one of float32, bfloat16, float16; D up to 256.
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
    limits.check(limits.memory_attention(query, memory, prototypes))
    save = _wants_grad(query)
    owner, known = (None, None) if cluster is None else within(cluster, memory.shape[0])
    out, matched, _ = torch.ops.simmp_fast.memory_attention(query, memory, prototypes, owner, save)
    return (out, matched) if cluster is None or known is None else (spoiled(out, query, known), cluster)


def memory_context_attention(
    query: Tensor, key: Tensor, value: Tensor, memory: Tensor, prototypes: Tensor, cluster: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The sum of `context_attention` and `memory_attention` in one pass over the queries (section 2).

    Args:
        query, key, value: ``[B, N, D]``, one of float32, bfloat16, float16; D up to 256.
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
    check_bank("query", query, memory, prototypes, cluster)
    limits.check(limits.memory_attention(query, memory, prototypes))
    save = _wants_grad(query, key, value)
    owner, known = (None, None) if cluster is None else within(cluster, memory.shape[0])
    found = torch.ops.simmp_fast.memory_context_attention(query, key, value, memory, prototypes, owner, save)
    return found[:2] if cluster is None or known is None else (spoiled(found[0], query, known), cluster)


def _wants_grad(*inputs: Tensor) -> bool:
    """Whether a backward may follow, so that the forward has to keep what it needs."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in inputs)


def _forward(
    name: str, query: Tensor, key: Tensor | None, value: Tensor | None, memory: Tensor | None,
    prototypes: Tensor | None, cluster: Tensor | None, save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Launch the forward kernel; returns output, cluster found, context in float32, and the two log-sum-exps."""
    check_launchable(query=query, key=key, value=value, memory=memory, prototypes=prototypes)
    out, found, context, context_lse, memory_lse = _empty(query, key, memory, cluster, save)
    if out.numel() == 0:
        return out, found, context, context_lse, memory_lse
    images, tokens, dim = query.shape
    query = rows_contiguous(query)
    key = query if key is None else rows_contiguous(key)
    value = query if value is None else rows_contiguous(value)
    slots = clusters = 0
    if memory is not None and prototypes is not None:
        clusters, slots = memory.shape[:2]
        memory, prototypes = memory.to(query.dtype).contiguous(), prototypes.contiguous()
    kind = dtype_class(query.dtype)
    config = pick(f"{name}_forward", kind, dim, query.device)
    dim_a, dim_b = split_dim(dim, kind)
    launch(
        attention_forward, (images * -(-tokens // config.tiles["BLOCK_M"]),), config, query.device,
        query, key, value, memory, prototypes, found if cluster is None else cluster.contiguous(), out,
        context, context_lse, memory_lse, *_steps(query, key, value), tokens, slots, clusters,
        DIM=dim, DIM_A=dim_a, DIM_B=dim_b, BLOCK_K=padded_clusters(clusters), CONTEXT="context" in name,
        MEMORY="memory" in name, MATCH=cluster is None, SAVE=save, SAVE_CONTEXT=context.numel() > 0,
        PRECISION=dot_precision(kind), MATCH_PRECISION=match_precision(kind),
    )  # fmt: skip
    return out, found, context, context_lse, memory_lse


def _empty(
    query: Tensor, key: Tensor | None, memory: Tensor | None, cluster: Tensor | None, save: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The results of `_forward`, not yet filled; what a call does not need is of size 0."""
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    tokens = query.shape[:2]
    found = query.new_empty(tokens if memory is not None and cluster is None else (0,), dtype=torch.int64)
    context_follows = save and key is not None
    # A float32 backward recomputes its row deltas and needs no copy of the context.
    kept = context_follows and query.dtype != torch.float32
    context = query.new_empty(query.shape if kept else (0,), dtype=torch.float32)
    context_lse = query.new_empty((*tokens, 2) if context_follows else (0,), dtype=torch.float32)
    memory_lse = query.new_empty(tokens if save and memory is not None else (0,), dtype=torch.float32)
    return out, found, context, context_lse, memory_lse


def _steps(*tensors: Tensor) -> list[int]:
    """Batch and row strides, one after the other, as the kernels take them."""
    return [step for x in tensors for step in x.stride()[:2]]


# The forward operators. Each returns what its backward needs beside its result; `save` says whether that is filled.


def _context_fake(query: Tensor, key: Tensor, value: Tensor, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    out, _, context, context_lse, _ = _empty(query, key, None, None, save)
    return out, context, context_lse


@operator("context_attention", _context_fake)
def _context(query: Tensor, key: Tensor, value: Tensor, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    out, _, context, context_lse, _ = _forward("context", query, key, value, None, None, None, save)
    return out, context, context_lse


def _memory_fake(
    query: Tensor, memory: Tensor, prototypes: Tensor, cluster: Tensor | None, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    out, found, _, _, memory_lse = _empty(query, None, memory, cluster, save)
    return out, found, memory_lse


@operator("memory_attention", _memory_fake)
def _memory(
    query: Tensor, memory: Tensor, prototypes: Tensor, cluster: Tensor | None, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    out, found, _, _, memory_lse = _forward("memory", query, None, None, memory, prototypes, cluster, save)
    return out, found, memory_lse


def _memory_context_fake(
    query: Tensor, key: Tensor, value: Tensor, memory: Tensor, prototypes: Tensor, cluster: Tensor | None, save: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _empty(query, key, memory, cluster, save)


@operator("memory_context_attention", _memory_context_fake)
def _memory_context(
    query: Tensor, key: Tensor, value: Tensor, memory: Tensor, prototypes: Tensor, cluster: Tensor | None, save: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _forward("memory_context", query, key, value, memory, prototypes, cluster, save)


# The backward operator, one for the three: parts that a forward did not have are None.


def _backward_fake(
    grad: Tensor, query: Tensor, key: Tensor | None, value: Tensor | None, memory: Tensor | None,
    cluster: Tensor | None, context: Tensor | None, context_lse: Tensor | None, memory_lse: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    query_grad = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    empty = query.new_empty(0)
    if key is None:
        return query_grad, empty, query.new_empty(0)
    return query_grad, torch.empty_like(query_grad), torch.empty_like(query_grad)


@operator("attention_backward", _backward_fake)
def _backward(
    grad: Tensor, query: Tensor, key: Tensor | None, value: Tensor | None, memory: Tensor | None,
    cluster: Tensor | None, context: Tensor | None, context_lse: Tensor | None, memory_lse: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    check_launchable(grad=grad, query=query)
    query_grad, key_grad, value_grad = _backward_fake(
        grad, query, key, value, memory, cluster, context, context_lse, memory_lse
    )
    if query_grad.numel() == 0:
        return query_grad, key_grad, value_grad
    images, tokens, dim = query.shape
    grad, query = rows_contiguous(grad.to(query.dtype)), rows_contiguous(query)
    keys = query if key is None else rows_contiguous(key)
    values = query if value is None else rows_contiguous(value)
    clusters, slots = (0, 0) if memory is None else memory.shape[:2]
    if memory is not None and cluster is not None:
        memory, cluster = memory.to(query.dtype).contiguous(), cluster.contiguous()
    kind = dtype_class(query.dtype)
    dim_a, dim_b = split_dim(dim, kind)
    constants: dict[str, Any] = {"DIM": dim, "DIM_A": dim_a, "DIM_B": dim_b, "PRECISION": dot_precision(kind)}
    delta = None if key is None else query.new_empty((images, tokens), dtype=torch.float32)
    steps = _steps(query, keys, values, grad)
    name = "memory" if key is None else "context" if memory is None else "memory_context"
    config = pick(f"{name}_backward_query", kind, dim, query.device)
    launch(
        attention_backward_query, (images * -(-tokens // config.tiles["BLOCK_M"]),), config, query.device,
        query, keys, values, memory, cluster, grad, context, context_lse, memory_lse, delta, query_grad,
        *steps, tokens, slots, clusters, CONTEXT=key is not None, MEMORY=memory is not None,
        RECOMPUTE=query.dtype == torch.float32, **constants,
    )  # fmt: skip
    if key is not None:
        config = pick("context_backward_key_value", kind, dim, query.device)
        launch(
            attention_backward_key_value, (images * -(-tokens // config.tiles["BLOCK_N"]),), config, query.device,
            query, keys, values, grad, context_lse, delta, key_grad, value_grad, *steps, tokens, **constants,
        )  # fmt: skip
    return query_grad, key_grad, value_grad


def _keep_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, key, value, _ = inputs
    _, context, context_lse = output
    ctx.mark_non_differentiable(context, context_lse)
    ctx.save_for_backward(query, key, value, context, context_lse)


def _context_grad(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    query, key, value, context, context_lse = ctx.saved_tensors
    back = torch.ops.simmp_fast.attention_backward
    return (*back(grad, query, key, value, None, None, context, context_lse, None), None)


def _keep_memory(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, memory, _, cluster, _ = inputs
    _, found, memory_lse = output
    ctx.mark_non_differentiable(found, memory_lse)
    ctx.save_for_backward(query, memory, found if cluster is None else cluster, memory_lse)


def _memory_grad(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    query, memory, cluster, memory_lse = ctx.saved_tensors
    back = torch.ops.simmp_fast.attention_backward
    return back(grad, query, None, None, memory, cluster, None, None, memory_lse)[0], None, None, None, None


def _keep_memory_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, key, value, memory, _, cluster, _ = inputs
    _, found, context, context_lse, memory_lse = output
    ctx.mark_non_differentiable(found, context, context_lse, memory_lse)
    owner = found if cluster is None else cluster
    ctx.save_for_backward(query, key, value, memory, owner, context, context_lse, memory_lse)


def _memory_context_grad(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return (*torch.ops.simmp_fast.attention_backward(grad, *ctx.saved_tensors), None, None, None, None)


autograd(_context, _keep_context, _context_grad)
autograd(_memory, _keep_memory, _memory_grad)
autograd(_memory_context, _keep_memory_context, _memory_context_grad)


# Autocast: products in its dtype; the matching keeps the query as it came, as the definition does.


def _autocast_context(dtype: torch.dtype, query: Tensor, key: Tensor, value: Tensor, save: bool) -> Any:
    return torch.ops.simmp_fast.context_attention(lower(query, dtype), lower(key, dtype), lower(value, dtype), save)


def _matched_apart(dtype: torch.dtype, query: Tensor, prototypes: Tensor, cluster: Tensor | None) -> Tensor | None:
    """The cluster found from the unrounded query where the cast would round it; else `cluster` as it is."""
    return match_clusters(query, prototypes) if cluster is None and query.dtype != dtype else cluster


def _autocast_memory(
    dtype: torch.dtype, query: Tensor, memory: Tensor, prototypes: Tensor, cluster: Tensor | None, save: bool
) -> Any:
    owner = _matched_apart(dtype, query, prototypes, cluster)
    out, found, lse = torch.ops.simmp_fast.memory_attention(lower(query, dtype), memory, prototypes, owner, save)
    return out, owner if cluster is None and owner is not None else found, lse


def _autocast_memory_context(
    dtype: torch.dtype, query: Tensor, key: Tensor, value: Tensor, memory: Tensor, prototypes: Tensor,
    cluster: Tensor | None, save: bool,
) -> Any:  # fmt: skip
    owner = _matched_apart(dtype, query, prototypes, cluster)
    low = [lower(x, dtype) for x in (query, key, value)]
    out, found, *kept = torch.ops.simmp_fast.memory_context_attention(*low, memory, prototypes, owner, save)
    return out, owner if cluster is None and owner is not None else found, *kept


autocast("context_attention", _autocast_context)
autocast("memory_attention", _autocast_memory)
autocast("memory_context_attention", _autocast_memory_context)


# Operations needed, two for a multiply-add; a token meets the slots of its own cluster alone.


def _context_flops(query: Any, *_: Any, **__: Any) -> int:
    images, tokens, dim = query
    return 4 * images * tokens * tokens * dim


def _memory_flops(query: Any, memory: Any, prototypes: Any, cluster: Any, *_: Any, **__: Any) -> int:
    images, tokens, dim = query
    matching = memory[0] if cluster is None else 0
    return 2 * images * tokens * dim * (2 * memory[1] + matching)


def _memory_context_flops(query: Any, key: Any, value: Any, *bank: Any, **__: Any) -> int:
    return _context_flops(query) + _memory_flops(query, *bank)


def _backward_flops(grad: Any, query: Any, key: Any, value: Any, memory: Any, *_: Any, **__: Any) -> int:
    images, tokens, dim = query
    columns = (5 * tokens if key is not None else 0) + (3 * memory[1] if memory is not None else 0)
    return 2 * images * tokens * dim * columns


flops("context_attention", _context_flops)
flops("memory_attention", _memory_flops)
flops("memory_context_attention", _memory_context_flops)
flops("attention_backward", _backward_flops)
