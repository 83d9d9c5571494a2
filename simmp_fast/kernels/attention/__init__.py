"""DMW-LA's attention: matching, context attention and memory attention, apart or in one pass."""

from . import table  # noqa: F401  (registers the configurations)
from .operators import context_attention, memory_attention, memory_context_attention

__all__ = ["context_attention", "memory_attention", "memory_context_attention"]
