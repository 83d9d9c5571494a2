"""Tokens laid out by cluster in tiles of fixed size, with shapes that depend on no data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Tokens in a tile. One gather of a cluster's slots serves a tile, so their copies cost M / TILE of the tokens' own
# memory; a larger tile pads more, by TILE rows a cluster at most.
TILE = 64


@dataclass(frozen=True)
class Tiles:
    """Where the tokens of each cluster lie when every cluster starts a new tile of `TILE` rows.

    Attributes:
        row: ``[T]`` int64, the row of each token among ``tiles * TILE``; tokens of a cluster keep their order.
        owner: ``[tiles]`` int64, the cluster of each tile.
        rank: ``[T]`` int64, the place of each token in its cluster.
        count: ``[K]`` int64, the tokens of each cluster.
    """

    row: Tensor
    owner: Tensor
    rank: Tensor
    count: Tensor


def tile_layout(cluster: Tensor, clusters: int) -> Tiles:
    """The layout of ``cluster [T]`` over `clusters` clusters.

    ``T // TILE + clusters`` tiles hold any assignment, so the number is known before it is: places come from running
    counts, no index list is built. Tiles past the last token belong to the last cluster and stay empty.
    """
    names = torch.arange(clusters, device=cluster.device)
    member = cluster == names.unsqueeze(1)
    place = member.cumsum(1)
    count = place[:, -1] if cluster.shape[0] else torch.zeros_like(names)
    end = ((count + TILE - 1) // TILE).cumsum(0)
    first = F.pad(end[:-1], (1, 0)) * TILE
    rank = place.gather(0, cluster.unsqueeze(0)).squeeze(0) - 1
    tiles = torch.arange(cluster.shape[0] // TILE + clusters, device=cluster.device)
    owner = torch.searchsorted(end, tiles, right=True).clamp_max(clusters - 1)
    return Tiles(first[cluster] + rank, owner, rank, count)


def to_tiles(tokens: Tensor, tiles: Tiles, fill: float = 0.0) -> Tensor:
    """``[T, D] -> [tiles, TILE, D]``; rows without a token hold `fill`."""
    # Three axes from the start: a view that parts the rows would tie an export to the batch it was traced with.
    rows = tokens.new_full((tiles.owner.shape[0], TILE, tokens.shape[1]), fill)
    return rows.index_put((tiles.row // TILE, tiles.row % TILE), tokens)


def from_tiles(rows: Tensor, tiles: Tiles) -> Tensor:
    """``[tiles, TILE, D] -> [T, D]``, the inverse of `to_tiles`."""
    return rows.flatten(0, 1).index_select(0, tiles.row)
