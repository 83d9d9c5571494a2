"""More inputs for the DMW-LA kernels: every way a head dim is split, many clusters, slots past a tile, large banks."""

from __future__ import annotations

from typing import Any

import torch
from parity_cases import CASES, Maker

OPERATORS = (
    "assign_clusters",
    "context_attention",
    "memory_attention",
    "memory_context_attention",
    "update_memory",
)
HEAD_DIMS = (8, 17, 40, 64, 80, 96, 128, 130, 192, 224, 256)
# name -> (batch, tokens, dim, clusters, slots)
SIZES = {f"dim_{dim}": (1, 21, dim, 2, 19) for dim in HEAD_DIMS}
SIZES |= {"clusters_64": (1, 70, 16, 64, 5), "slots_133": (1, 19, 16, 2, 133), "tile_and_one": (3, 129, 24, 3, 100)}


def _attention(m: Maker, batch: int, tokens: int, dim: int) -> dict[str, Any]:
    scale = dim**-0.25
    query, key = (m.normal(batch, tokens, dim, scale=scale) for _ in range(2))
    return {"query": query, "key": key, "value": m.normal(batch, tokens, dim)}


def _bank(m: Maker, clusters: int, slots: int, dim: int) -> dict[str, Any]:
    return {"memory": m.uniform(clusters, slots, dim), "prototypes": m.uniform(clusters, dim) - 0.5}


def _fused(m: Maker, base: int) -> dict[str, Any]:
    """Query, key and value are slices of one projection: rows are three head dims apart."""
    projected = m.normal(2, 50, 3 * base, scale=base**-0.25)
    return dict(zip(("query", "key", "value"), projected.split(base, -1), strict=True))


def register() -> None:
    """Add the cases to the shared registry."""
    for name, (batch, tokens, dim, clusters, slots) in SIZES.items():
        size, bank = (batch, tokens, dim), (clusters, slots, dim)
        CASES["context_attention"][name] = lambda m, s=size: _attention(m, *s)
        CASES["memory_context_attention"][name] = lambda m, s=size, b=bank: {**_attention(m, *s), **_bank(m, *b)}
        CASES["memory_attention"][name] = lambda m, s=size, b=bank: {"query": m.normal(*s), **_bank(m, *b)}
        CASES["update_memory"][name] = lambda m, s=size, b=bank: {
            "tokens": m.normal(*s),
            **_bank(m, *b),
            "k": torch.tensor(b[1] // 2 + 1, device=m.device),
        }
        for metric in ("cosine", "dot"):
            CASES["assign_clusters"][f"{name}_{metric}"] = lambda m, s=size, b=bank, metric=metric: {
                "query": m.normal(*s),
                "prototypes": m.uniform(b[0], b[2]) - 0.5,
                "metric": metric,
            }
    CASES["context_attention"]["fused"] = lambda m: _fused(m, 32)
    CASES["memory_context_attention"]["fused"] = lambda m: {**_fused(m, 32), **_bank(m, 3, 9, 32)}
