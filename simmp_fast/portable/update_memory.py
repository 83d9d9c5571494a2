"""The update of the memory bank by the tokens of a training step (section 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ranks import ALONE, Ranks
from ..validation import check_update_memory, nan_unless, within
from .assign_clusters import assign_clusters
from .precision import at_least_float32, exp_
from .tiles import Tiles, from_tiles, tile_layout, to_tiles

_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}
# The fingerprint of a row is a polynomial in this odd number, modulo 2^64.
_ODD = -7046029254386353131


def _first_equal(memory: Tensor) -> Tensor:
    """``[K, M]``: for each slot the lowest slot of its cluster with the same bits.

    Compares 64-bit fingerprints. Integer sums are exact in any order, so equal rows agree on every device.
    """
    bits = memory.view(_BITS[memory.dtype]).long()
    odd = torch.full((memory.shape[2],), _ODD, dtype=torch.int64, device=memory.device).cumprod(0)
    fingerprint = (bits * odd).sum(-1)
    return (fingerprint.unsqueeze(2) == fingerprint.unsqueeze(1)).int().argmax(-1)


def slot_order(memory: Tensor) -> Tensor:
    """``[K, M]``: the slots of each cluster by rising score.

    Equal slots take the score of the first of them: rounding in a vectorised sum may depend on the position, and the
    lower index must win.
    """
    score = memory.softmax(1).sum(-1)
    return score.gather(1, _first_equal(memory)).argsort(dim=1, stable=True)


def repetitions(owner: Tensor, rank: Tensor, count: Tensor, width: int | Tensor) -> Tensor:
    """``[T]``: how often each token is counted when a cluster of fewer than `width` is repeated cyclically.

    Args:
        owner: ``[T]``, the cluster of each token.
        rank: ``[T]``, the place of each token in its cluster.
        count: ``[K]``, the tokens of each cluster.
        width: tokens that are needed.
    """
    short = count < width
    filled = count.clamp_min(1)
    whole, rest = torch.where(short, width // filled, 1), torch.where(short, width % filled, 0)
    return whole[owner] + (rank < rest[owner])


def token_scores(tokens: Tensor, repeats: Tensor, tiles: Tiles, clusters: int, ranks: Ranks = ALONE) -> Tensor:
    """``[T]``: softmax over the tokens of a cluster, each counted `repeats` times, per channel; summed over channels.

    Tokens are reduced tile by tile and tiles cluster by cluster, without atomics. A cluster without tokens has no rows
    whose score is read; its peak and its total are kept finite for the empty tiles that may name it. Where several
    ranks hold tokens, the softmax is over those of all.
    """
    mine = (tiles.owner == torch.arange(clusters, device=tokens.device).unsqueeze(1)).unsqueeze(-1)
    rows = to_tiles(tokens, tiles, -torch.inf)
    peak = ranks.largest(rows.amax(1).where(mine, -torch.inf).amax(1))
    peak = peak.where(peak.isfinite(), 0.0)
    weights = exp_(rows.sub_(peak[tiles.owner].unsqueeze(1)))
    counted = weights * to_tiles(repeats.to(tokens.dtype).unsqueeze(1), tiles)
    total = ranks.total(counted.sum(1).where(mine, 0.0).sum(1))
    share = total.clamp_min(torch.finfo(total.dtype).tiny).reciprocal()[tiles.owner].unsqueeze(1)
    return from_tiles(weights.mul_(share).sum(-1, keepdim=True), tiles).squeeze(1)


def best_tokens(scores: Tensor, owner: Tensor, count: Tensor, slots: int) -> Tensor:
    """``[K, M]``: the tokens of each cluster by falling score; past its `count` an entry means nothing."""
    falling = scores.argsort(descending=True, stable=True)
    falling = falling[owner[falling].argsort(stable=True)]
    place = torch.arange(slots, device=owner.device)
    start = count.cumsum(0) - count
    return falling[(start.unsqueeze(1) + place).clamp_max(scores.shape[0] - 1)]


def written_places(repeats: Tensor) -> Tensor:
    """``[K, M]``: which of a cluster's candidates each write takes, when candidate j comes ``repeats[:, j]`` times."""
    slots = repeats.shape[1]
    place = torch.arange(slots, device=repeats.device).expand_as(repeats).contiguous()
    return torch.searchsorted(repeats.cumsum(1), place, right=True).clamp_max(slots - 1)


def write_slots(bank: Tensor, newest: Tensor, filled: Tensor, width: int | Tensor, rate: float) -> Tensor:
    """The bank ``[K, M, D]`` after `newest`, in its order, went over the `width` lowest slots of filled clusters."""
    order = slot_order(bank).unsqueeze(-1).expand_as(bank)
    oldest = bank.gather(1, order)
    write = (torch.arange(bank.shape[1], device=bank.device) < width) & filled.unsqueeze(1)
    mixed = torch.where(write.unsqueeze(-1), (1 - rate) * oldest + rate * newest, oldest)
    return torch.empty_like(bank).scatter(1, order, mixed)


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

    All clusters go at once with fixed shapes: `k` stays on its device and becomes a mask over the M slots, and the
    cyclic repetition becomes a count per token, which weighs its softmax and its run in the written list.

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
    if tokens.shape[0] * tokens.shape[1] == 0:
        return memory.clone(), at_least_float32(memory).mean(1).to(memory.dtype)
    if cluster is None:
        return _update(tokens, memory, k, rate, assign_clusters(tokens, prototypes, metric="dot"))
    owner, known = within(cluster, memory.shape[0])
    factor = nan_unless(known.all(), memory)
    memory, prototypes = _update(tokens, memory, k, rate, owner)
    return memory * factor, prototypes * factor


def _update(tokens: Tensor, memory: Tensor, k: int | Tensor, rate: float, cluster: Tensor) -> tuple[Tensor, Tensor]:
    clusters, slots, dim = memory.shape
    bank = at_least_float32(memory)
    flat, owner = tokens.reshape(-1, dim).to(bank.dtype), cluster.reshape(-1)
    width = k.clamp(1, slots).long() if isinstance(k, Tensor) else k

    tiles = tile_layout(owner, clusters)
    repeats = repetitions(owner, tiles.rank, tiles.count, width)
    best = best_tokens(token_scores(flat, repeats, tiles, clusters), owner, tiles.count, slots)
    present = torch.arange(slots, device=owner.device) < tiles.count.unsqueeze(1)
    newest = flat[best.gather(1, written_places(repeats[best].where(present, 0)))]
    updated = write_slots(bank, newest, tiles.count > 0, width, rate)
    return updated.to(memory.dtype), updated.mean(1).to(memory.dtype)
