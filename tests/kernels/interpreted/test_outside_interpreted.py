"""The kernels' part of the rule for labels and clusters outside of their range."""

from __future__ import annotations

import pytest
from outside_indices import OUTSIDE, WEIGHTS, check_attention, check_loss, check_update

from simmp_fast import kernels


@pytest.mark.parametrize(
    ("outside", "weights"), [*((outside, {}) for outside in OUTSIDE[-2:]), *((255, weights) for weights in WEIGHTS)]
)
def test_loss(outside: int, weights: dict[str, float]) -> None:
    check_loss(kernels, outside, weights)


@pytest.mark.parametrize("outside", OUTSIDE[:2])
@pytest.mark.parametrize("operator", ["memory_attention", "memory_context_attention"])
def test_attention(operator: str, outside: int) -> None:
    check_attention(kernels, operator, outside)


@pytest.mark.parametrize("outside", OUTSIDE[:2])
def test_update(outside: int) -> None:
    check_update(kernels, outside)
