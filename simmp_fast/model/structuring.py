"""Structuring: how a warmed-up bank becomes clusters (section 3.2)."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor


def _cluster_slots(centroid: Tensor, members: Tensor, slots: int, generator: torch.Generator) -> Tensor:
    """The ``[M, D]`` slots of one new cluster from its ``[n, D]`` members in slot order."""
    count = len(members)
    if count == 0:
        return centroid.expand(slots, -1)
    if count >= slots:
        return members[:slots]
    repeats = torch.randint(count, (slots - count,), generator=generator, device=members.device)
    return torch.cat([members, members[repeats]])


def structure(memory: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Cluster all slots of a bank by k-means and lay them out cluster by cluster.

    Runs on the host, once in a network's life. A new cluster takes its first M members in slot order; a smaller one
    holds every member and repeats members at random up to M; an empty one holds its centroid.

    Args:
        memory: ``[K, M, D]``, any device.
        generator: a CPU generator for the repeats.

    Returns:
        memory ``[K, M, D]`` and prototypes ``[K, D]``, the L2-normalised centroids, as `memory` in dtype and device.

    Raises:
        ValueError: the bank holds a value that is not finite.
    """
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    clusters, slots, dim = memory.shape
    flat = memory.detach().cpu().reshape(-1, dim)
    if not bool(flat.isfinite().all()):
        raise ValueError("memory: got a value that is not finite after warm-up, expected finite slots to cluster")
    points = flat.to(torch.promote_types(flat.dtype, torch.float32)).numpy()  # NumPy has no bfloat16
    with warnings.catch_warnings():
        # Fewer distinct slots than clusters leave clusters empty, which the layout below provides for.
        warnings.simplefilter("ignore", ConvergenceWarning)
        result = KMeans(n_clusters=clusters, random_state=0).fit(points)
    centroids = torch.from_numpy(result.cluster_centers_).to(flat.dtype)
    owner = torch.from_numpy(result.labels_).long()
    rows = [_cluster_slots(centroids[c], flat[owner == c], slots, generator) for c in range(clusters)]
    return torch.stack(rows).to(memory), F.normalize(centroids, dim=-1).to(memory)
