"""The kernels of DS-GIM's two similarities against the definition, output and gradients, on the edge grid."""

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
OPERATORS = ("window_similarity", "decay_weights", "split_threshold", "split_attention")
GRID = [(o, name) for o in OPERATORS for name in case_names(o) if (o, name) not in LONG]
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize(("operator", "name"), GRID)
def test_parity(operator: str, name: str, dtype: torch.dtype) -> None:
    check_case(operator, getattr(kernels, operator), name, dtype)


@pytest.mark.parametrize("name", ["odd_paper", "odd_released"])
def test_gradient_of_strides_zero(name: str) -> None:
    check_case("split_attention", kernels.split_attention, name, torch.float32, expand=True)
