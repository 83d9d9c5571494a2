"""`update_memory`: arguments, the four launches, registration, pinned configurations."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from ... import limits
from ...validation import check_update_memory, nan_unless, within
from ..aot import POINTERS, Signature, register_kernel
from ..configs import Config, pick, register_table
from ..launch import check_launchable, dtype_class, launch, rows_contiguous
from ..matching import match_precision, padded_clusters
from ..register import flops, operator
from .statistics import assign_and_measure, fold_statistics, score_tokens
from .write import write_slots

# The width of the first three is the head dim, that of the last the number of slots. `update_score` has the tiles of
# `update_assign`, whose counts say where the tokens of a tile go.
# kernel         dtype   width where tiles  warps stages shared_KiB stack provenance
register_table("""
update_assign    half    256 all BLOCK_T=64,BLOCK_C=32,BLOCK_D=64              8  2  64  0  ahead-of-time
update_assign    float32 256 all BLOCK_T=64,BLOCK_C=32,BLOCK_D=64              8  2  64  0  ahead-of-time
update_assign    tf32    256 all BLOCK_T=64,BLOCK_C=32,BLOCK_D=64              8  2  64  0  ahead-of-time
update_fold      any     256 all BLOCK_P=64,BLOCK_C=32                      4  2  16  0  ahead-of-time
update_score     any     256 all -                                          8  2  32  0  ahead-of-time
update_write     any     128 all BLOCK_S=128,BLOCK_N=2048,BLOCK_C=32,BLOCK_J=16 8 2 32 8 ahead-of-time # Triton 3.6, 9.0
update_write     any     2048 all BLOCK_S=2048,BLOCK_N=2048,BLOCK_C=8,BLOCK_J=8  16 2  64  0  ahead-of-time
""")


def update_memory(
    tokens: Tensor,
    memory: Tensor,
    prototypes: Tensor,
    k: int | Tensor,
    *,
    rate: float = 0.3,
    cluster: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Write the `k` most representative tokens of each cluster over its `k` least representative slots (section 3.3).

    Slot scores rise, token scores fall, ties go to the lower index, and the pairs are written in that order:
    ``slot <- (1 - rate) * slot + rate * token``. Fewer than `k` tokens are repeated cyclically. A cluster without
    tokens keeps its slots. Prototypes become the slot means. No host sync.

    Args:
        tokens: ``[B, N, D]``, float32, bfloat16 or float16; D up to 256.
        memory: ``[K, M, D]``, floating; M up to 2048.
        prototypes: ``[K, D]`` in the dtype of `memory`, as they were before the step.
        k: slots to write, 1 to M; a 0-d integer tensor on the device is clamped to that range there.
        rate: weight of the token.
        cluster: ``[B, N]`` int64 in ``[0, K)`` fixes the assignment, one outside makes both results NaN; None matches
            by dot product.

    Returns:
        memory ``[K, M, D]`` and prototypes ``[K, D]``, new tensors in the dtype of `memory`. They carry no gradient.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or device, or an int `k` outside 1..M.
    """
    check_update_memory(tokens, memory, prototypes, k, rate, cluster)
    limits.check(limits.update_memory(tokens, memory, prototypes))
    on_device, number = (k, 0) if isinstance(k, Tensor) else (None, k)
    tokens, memory, prototypes = tokens.detach(), memory.detach(), prototypes.detach()
    owner, known = (None, None) if cluster is None else within(cluster, memory.shape[0])
    found = torch.ops.simmp_fast.update_memory(tokens, memory, prototypes, on_device, number, float(rate), owner)
    if known is None:
        return found[0], found[1]
    factor = nan_unless(known.all(), memory)
    return found[0] * factor, found[1] * factor


def _fake(
    tokens: Tensor, memory: Tensor, prototypes: Tensor, k: Tensor | None, number: int, rate: float,
    cluster: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return memory.new_empty(memory.shape), prototypes.new_empty(prototypes.shape)


@operator("update_memory", _fake)
def _update(
    tokens: Tensor, memory: Tensor, prototypes: Tensor, k: Tensor | None, number: int, rate: float,
    cluster: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    check_launchable(tokens=tokens, memory=memory)
    clusters, slots, dim = memory.shape
    images, length = tokens.shape[0], max(tokens.shape[1], 1)
    device, kind, block_k = tokens.device, dtype_class(tokens.dtype), padded_clusters(clusters)
    tokens, memory, prototypes = rows_contiguous(tokens), memory.contiguous(), prototypes.contiguous()
    padded = max(16, triton.next_power_of_2(dim))
    first, fold = pick("update_assign", kind, dim, device), pick("update_fold", kind, dim, device)
    second, write = pick("update_score", kind, dim, device), pick("update_write", kind, slots, device)
    total = tokens.shape[0] * tokens.shape[1]
    tiles = images * triton.cdiv(length, first.tiles["BLOCK_T"]) if total else 0
    integers: dict[str, Any] = {"dtype": torch.int32, "device": device}
    floats: dict[str, Any] = {"dtype": torch.float32, "device": device}

    owner = torch.empty(total, **integers)
    count = torch.empty((tiles, clusters), **integers)
    peak, mass = torch.empty((2, tiles, clusters, dim), **floats)
    stride_b, stride_n = tokens.stride()[:2]
    launch(
        assign_and_measure, (tiles,), first, device,
        tokens, prototypes, None if cluster is None else cluster.contiguous(), owner, count, peak, mass,
        stride_b, stride_n, length, clusters,
        DIM=dim, BLOCK_K=block_k, MATCH=cluster is None, PRECISION=match_precision(kind),
    )  # fmt: skip
    before, members = torch.empty((tiles, clusters), **integers), torch.empty(clusters, **integers)
    highest, summed = torch.empty((2, clusters, dim), **floats)
    launch(
        fold_statistics, (clusters, triton.cdiv(dim, fold.tiles["BLOCK_C"])), fold, device,
        count, peak, mass, before, members, highest, summed, tiles, clusters, DIM=dim,
    )  # fmt: skip
    score, index = torch.empty(total, **floats), torch.empty(total, dtype=torch.int64, device=device)
    launch(
        score_tokens, (tiles,), second, device,
        tokens, owner, before, members, highest, summed, score, index, stride_b, stride_n, length, clusters,
        DIM=dim, PADDED=padded, BLOCK_K=block_k, BLOCK_T=first.tiles["BLOCK_T"],
    )  # fmt: skip
    new_memory, new_prototypes = torch.empty_like(memory), torch.empty_like(prototypes)
    scratch = (clusters, 2, write.tiles["BLOCK_S"])
    launch(
        write_slots, (clusters,), write, device,
        tokens, memory, members, score, index, k, new_memory, new_prototypes, torch.empty(scratch, **floats),
        torch.empty(scratch, dtype=torch.int64, device=device), number, rate, stride_b, stride_n, length, slots,
        clusters, DIM=dim, BLOCK_K=block_k, WIDTH_ON_DEVICE=k is not None,
    )  # fmt: skip
    return new_memory, new_prototypes


def _flops(tokens: Any, memory: Any, *_: Any, **__: Any) -> int:
    images, length, dim = tokens
    return 2 * images * length * memory[0] * dim


flops("update_memory", _flops)

_INTEGERS = dict.fromkeys(("length", "clusters", "tiles", "slots", "width"), "i32")
_ARGUMENTS = {
    "prototypes": "*fp32:16", "memory": "*fp32:16", "new_memory": "*fp32:16", "new_prototypes": "*fp32:16",
    "cluster": "*i64:16", "index": "*i64:16", "index_scratch": "*i64:16", "width_tensor": "*i64:16",
    "owner": "*i32:16", "count": "*i32:16", "before": "*i32:16", "members": "*i32:16", "peak": "*fp32:16",
    "mass": "*fp32:16", "highest": "*fp32:16", "total": "*fp32:16", "score": "*fp32:16", "value_scratch": "*fp32:16",
    "stride_b": "i32:16", "stride_n": "i32:16", "rate": "fp32", **_INTEGERS,
}  # fmt: skip


def _signature(kernel: Any, constants: tuple[str, ...], config: Config, dtype: str) -> Signature:
    """How one of the four kernels is compiled: at 64 padded clusters, the most it is made for."""
    known = {
        "DIM": 256 if kernel is write_slots else config.width, "PADDED": 256, "BLOCK_K": 64, "BLOCK_T": 64,
        "MATCH": True, "PRECISION": match_precision(config.dtype), "WIDTH_ON_DEVICE": True,
    }  # fmt: skip
    arguments = {**_ARGUMENTS, "tokens": POINTERS[dtype]}
    return Signature(kernel, arguments, {name: known[name] for name in constants}, products=False)


def _register(name: str, kernel: Any, *constants: str) -> None:
    register_kernel(name, lambda config, dtype: _signature(kernel, constants, config, dtype))


_register("update_assign", assign_and_measure, "DIM", "BLOCK_K", "MATCH", "PRECISION")
_register("update_fold", fold_statistics, "DIM")
_register("update_score", score_tokens, "DIM", "PADDED", "BLOCK_K", "BLOCK_T")
_register("update_write", write_slots, "DIM", "BLOCK_K", "WIDTH_ON_DEVICE")
