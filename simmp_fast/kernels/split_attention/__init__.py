"""The split attention of DS-GIM: both softmaxes in one streamed kernel, and its gradients."""

from __future__ import annotations

from . import table  # noqa: F401  (registers the pinned configurations)
from .operators import split_attention

__all__ = ["split_attention"]
