"""What the tests of the kernels on a GPU share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def fresh_memory_is_nan() -> Iterator[None]:
    """Deterministic mode fills fresh memory with NaN, so that anything a kernel leaves unwritten shows.

    It only warns of operators that have no deterministic form on a GPU: the definition uses such (the cross-entropy of
    maps, for one), and nothing here depends on their order of addition.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
