"""Which cluster of the memory bank a token belongs to (sections 2 and 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..validation import check_assign_clusters
from .precision import at_least_float32, no_autocast

NORM_FLOOR = 1e-8


@torch.no_grad()
def assign_clusters(query: Tensor, prototypes: Tensor, *, metric: str = "cosine") -> Tensor:
    """The prototype most similar to each token; ties go to the lower index.

    The norm of a token scales all its similarities alike, so the argmax does not need it: one product with the
    normalised prototypes serves both metrics.

    Args:
        query: ``[B, N, D]``, floating.
        prototypes: ``[K, D]``, floating.
        metric: ``"cosine"`` (each norm clamped at 1e-8) or ``"dot"``.

    Returns:
        cluster ``[B, N]``, int64 in ``[0, K)``. Carries no gradient.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or choice.
    """
    check_assign_clusters(query, prototypes, metric)
    with no_autocast(query):
        tokens, anchors = at_least_float32(query), at_least_float32(prototypes)
        dtype = torch.promote_types(tokens.dtype, anchors.dtype)
        tokens, anchors = tokens.to(dtype), anchors.to(dtype)
        if metric == "cosine":
            anchors = anchors / anchors.norm(dim=-1, keepdim=True).clamp_min(NORM_FLOOR)
        return (tokens @ anchors.t()).argmax(-1)
