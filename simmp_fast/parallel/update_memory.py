"""The update of a memory bank by the tokens of all ranks (section 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..portable.precision import at_least_float32
from ..portable.tiles import tile_layout
from ..portable.update_memory import best_tokens, repetitions, token_scores, write_slots, written_places
from ..ranks import ALONE, Ranks
from ..validation import check_update_memory


@torch.no_grad()
def update_memory(
    tokens: Tensor,
    memory: Tensor,
    prototypes: Tensor,
    k: int | Tensor,
    *,
    rate: float = 0.3,
    backend: str = "auto",
    ranks: Ranks = ALONE,
) -> tuple[Tensor, Tensor]:
    """`ops.update_memory` on the tokens of all ranks, concatenated in the order of the ranks.

    Little travels: the number of tokens of each cluster, softmax statistics per cluster and channel, score and
    repetitions of each rank's M best tokens of a cluster, and at most M tokens a cluster, those that are written. All
    ranks hold the same candidates in the same order, so they take the same: on a tie that of the lower rank, and of one
    rank that of the lower index.

    Built on the pieces of the portable operator whatever the backend, which only assigns the clusters. Shapes depend on
    no data and nothing waits for the device.

    Args:
        tokens: ``[B, N, D]``, floating; B may differ between the ranks, and be 0.
        memory, prototypes, k, rate: as in `ops.update_memory`, the same on every rank.
        backend: operator backend.
        ranks: who takes part.

    Returns:
        memory ``[K, M, D]`` and prototypes ``[K, D]``, new tensors in the dtype of `memory`, equal on all ranks.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or device, or an int `k` outside 1..M.
    """
    if ranks.size == 1:
        return ops.update_memory(tokens, memory, prototypes, k, rate=rate, backend=backend)
    check_update_memory(tokens, memory, prototypes, k, rate, None)
    clusters, slots, dim = memory.shape
    bank = at_least_float32(memory)
    width = k.clamp(1, slots).long() if isinstance(k, Tensor) else k
    owner = ops.assign_clusters(tokens, prototypes, metric="dot", backend=backend).reshape(-1)
    flat = tokens.reshape(-1, dim).to(bank.dtype)

    tiles = tile_layout(owner, clusters)
    counts = ranks.gather(tiles.count)
    count, before = counts.sum(0), counts[: ranks.rank].sum(0)
    repeats = repetitions(owner, before[owner] + tiles.rank, count, width)
    scores = token_scores(flat, repeats, tiles, clusters, ranks)
    if len(flat):
        best = best_tokens(scores, owner, tiles.count, slots)
        offered, score, times = flat[best], scores[best], repeats[best].to(bank.dtype)
    else:
        offered, score, times = torch.zeros_like(bank), *bank.new_zeros((2, clusters, slots))

    # A score is never negative: -1 is behind all tokens. Repetitions, at most M, are exact in any floating dtype here.
    present = torch.arange(slots, device=owner.device) < tiles.count.unsqueeze(1)
    candidates = ranks.gather(torch.stack([score.where(present, -1.0), times.where(present, 0.0)]))
    score, times = candidates.permute(1, 2, 0, 3).flatten(2)
    order = score.argsort(dim=1, descending=True, stable=True)[:, :slots]
    chosen = order.gather(1, written_places(times.gather(1, order).long()))
    cluster = torch.arange(clusters, device=owner.device).unsqueeze(1)
    row = (chosen // slots * clusters + cluster) * slots + chosen % slots
    newest = ranks.rows(offered.flatten(0, 1), row.flatten()).view_as(bank)
    updated = write_slots(bank, newest, count > 0, width, rate)
    return updated.to(memory.dtype), updated.mean(1).to(memory.dtype)
