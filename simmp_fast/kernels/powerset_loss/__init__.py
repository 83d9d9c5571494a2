"""The loss over all subsets of the heads, and its gradients at each head's own resolution."""

from __future__ import annotations

from . import table  # noqa: F401  (registers the pinned configurations)
from .operators import powerset_loss

__all__ = ["powerset_loss"]
