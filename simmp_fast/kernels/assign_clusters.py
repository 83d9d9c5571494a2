"""`assign_clusters`: one launch, each token read once, one index written."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import limits
from ..validation import check_assign_clusters
from .aot import POINTERS, Signature, register_kernel
from .configs import Config, pick, register_table
from .launch import check_launchable, dtype_class, launch, rows_contiguous
from .matching import match_precision, nearest_prototype, padded_clusters
from .register import flops, operator

# kernel         dtype   width capabilities tiles                     warps stages shared_KiB stack provenance
register_table("""
assign_clusters  half    256   all          BLOCK_T=64,BLOCK_C=32     4     2      48         0     ahead-of-time
assign_clusters  float32 256   all          BLOCK_T=64,BLOCK_C=32     4     2      48         0     ahead-of-time
assign_clusters  tf32    256   all          BLOCK_T=64,BLOCK_C=32     4     2      48         0     ahead-of-time
""")


@triton.jit(do_not_specialize=["tokens", "clusters"])
def assign_clusters_kernel(
    query, prototypes, cluster, query_b, query_n, tokens, clusters,
    DIM: tl.constexpr, BLOCK_K: tl.constexpr, COSINE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A program finds the prototypes of BLOCK_T tokens of one image; similarities never leave the registers."""
    tiles = tl.cdiv(tokens, BLOCK_T)
    image = (tl.program_id(0) // tiles).to(tl.int64)
    start = tl.program_id(0) % tiles * BLOCK_T
    row = tl.arange(0, BLOCK_T)
    valid = start + row < tokens
    query += image * query_b + start.to(tl.int64) * query_n
    found = nearest_prototype(
        query, row, query_n, valid, prototypes, clusters, DIM, BLOCK_K, BLOCK_C, COSINE, PRECISION
    )
    tl.store(cluster + image * tokens + start + row, found.to(tl.int64), mask=valid)


def assign_clusters(query: Tensor, prototypes: Tensor, *, metric: str = "cosine") -> Tensor:
    """The prototype most similar to each token; ties go to the lower index (sections 2 and 3.3).

    Args:
        query: ``[B, N, D]``, float32, bfloat16 or float16; never cast by autocast.
        prototypes: ``[K, D]``, float32, bfloat16 or float16.
        metric: ``"cosine"`` (each norm clamped at 1e-8) or ``"dot"``.

    Returns:
        cluster ``[B, N]``, int64 in ``[0, K)``. Carries no gradient.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or choice.
    """
    check_assign_clusters(query, prototypes, metric)
    limits.check(limits.assign_clusters(query, prototypes))
    return torch.ops.simmp_fast.assign_clusters(query.detach(), prototypes.detach(), metric)


def _fake(query: Tensor, prototypes: Tensor, metric: str) -> Tensor:
    return query.new_empty(query.shape[:2], dtype=torch.int64)


@operator("assign_clusters", _fake)
def _assign(query: Tensor, prototypes: Tensor, metric: str) -> Tensor:
    return match_clusters(query, prototypes, metric)


def match_clusters(query: Tensor, prototypes: Tensor, metric: str = "cosine") -> Tensor:
    """`assign_clusters` without its checks, for operators that have made them."""
    check_launchable(query=query, prototypes=prototypes)
    cluster = query.new_empty(query.shape[:2], dtype=torch.int64)
    if cluster.numel() == 0:
        return cluster
    images, tokens, dim = query.shape
    query = rows_contiguous(query)
    kind = dtype_class(query.dtype)
    config = pick("assign_clusters", kind, dim, query.device)
    launch(
        assign_clusters_kernel, (images * triton.cdiv(tokens, config.tiles["BLOCK_T"]),), config, query.device,
        query, prototypes.contiguous(), cluster, *query.stride()[:2], tokens, len(prototypes),
        DIM=dim, BLOCK_K=padded_clusters(len(prototypes)), COSINE=metric == "cosine", PRECISION=match_precision(kind),
    )  # fmt: skip
    return cluster


def _flops(query: tuple[int, ...], prototypes: tuple[int, ...], *_: object, **__: object) -> int:
    images, tokens, dim = query
    return 2 * images * tokens * dim * prototypes[0]


flops("assign_clusters", _flops)


def _signature(config: Config, dtype: str) -> Signature:
    kind = dtype if dtype in ("float32", "tf32") else "half"
    return Signature(
        assign_clusters_kernel,
        {
            "query": POINTERS[dtype], "prototypes": "*fp32:16", "cluster": "*i64:16", "query_b": "i32:16",
            "query_n": "i32:16", "tokens": "i32", "clusters": "i32",
        },
        {"DIM": config.width, "BLOCK_K": 64, "COSINE": True, "PRECISION": match_precision(kind)},
        products=False,
    )  # fmt: skip


register_kernel("assign_clusters", _signature)
