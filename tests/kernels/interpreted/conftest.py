"""These files run Triton's interpreter: collected only with TRITON_INTERPRET=1 (see test_interpreted.py)."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


@pytest.fixture(autouse=True)
def fresh_memory_is_nan() -> Iterator[None]:
    """Deterministic mode fills fresh memory with NaN, so that anything a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
