"""A label outside of the classes and a cluster outside of the bank come to the same in every implementation: NaN."""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch
from outside_indices import OUTSIDE, WEIGHTS, check_attention, check_loss, check_update

from simmp_fast import portable, reference

BOTH = pytest.mark.parametrize("implementation", [reference, portable], ids=["reference", "portable"])


@BOTH
@pytest.mark.parametrize("outside", OUTSIDE)
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_loss(implementation: ModuleType, outside: int, weights: dict[str, float]) -> None:
    check_loss(implementation, outside, weights)


@BOTH
@pytest.mark.parametrize("outside", OUTSIDE)
@pytest.mark.parametrize("operator", ["memory_attention", "memory_context_attention"])
def test_attention(implementation: ModuleType, operator: str, outside: int) -> None:
    check_attention(implementation, operator, outside)


@BOTH
@pytest.mark.parametrize("outside", OUTSIDE)
def test_update(implementation: ModuleType, outside: int) -> None:
    check_update(implementation, outside)


def test_a_batch_without_pixels_has_no_label_outside() -> None:
    heads = [torch.zeros(0, 3, 4, 4)]
    assert not math.isnan(float(portable.powerset_loss(heads, torch.zeros(0, 4, 4, dtype=torch.int64))))
