"""The subset loss's kernels against the definition, loss and gradients, on the edge grid."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from parity import case_names, check_case

sys.path.insert(0, str(Path(__file__).parents[1]))
from dsgim_cases import LONG, register

from simmp_fast import kernels

register()
GRID = [name for name in case_names("powerset_loss") if ("powerset_loss", name) not in LONG]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("name", GRID)
def test_parity(name: str, dtype: torch.dtype) -> None:
    check_case("powerset_loss", kernels.powerset_loss, name, dtype)


def test_gradient_of_strides_zero() -> None:
    check_case("powerset_loss", kernels.powerset_loss, "odd", torch.float32, expand=True)
