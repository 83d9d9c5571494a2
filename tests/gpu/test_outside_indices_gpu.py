"""Labels and clusters outside of their range on a GPU: the same as elsewhere."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from outside_indices import OUTSIDE, WEIGHTS, check_attention, check_loss, check_update

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is present"),
]


@pytest.fixture(params=["reference", "portable", "kernels"])
def implementation(request: pytest.FixtureRequest) -> Any:
    if request.param == "kernels":
        pytest.importorskip("triton")
    return importlib.import_module(f"simmp_fast.{request.param}")


@pytest.mark.parametrize("outside", OUTSIDE)
def test_outside(implementation: Any, outside: int) -> None:
    for weights in WEIGHTS:
        check_loss(implementation, outside, weights, "cuda")
    for operator in ("memory_attention", "memory_context_attention"):
        check_attention(implementation, operator, outside, "cuda")
    check_update(implementation, outside, "cuda")
