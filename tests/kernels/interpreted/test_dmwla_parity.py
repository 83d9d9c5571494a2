"""Every DMW-LA kernel against the definition, output and gradients, on the edge grid."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from parity import case_names, check_case

sys.path.insert(0, str(Path(__file__).parents[1]))
from dmwla_cases import OPERATORS, register

from simmp_fast import kernels

register()
GRID = [(operator, name) for operator in OPERATORS for name in case_names(operator)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize(("operator", "name"), GRID)
def test_parity(operator: str, name: str, dtype: torch.dtype) -> None:
    if name.startswith("long") and dtype != torch.float32:
        pytest.skip("slow under the interpreter: once is enough")
    check_case(operator, getattr(kernels, operator), name, dtype)


@pytest.mark.parametrize("operator", ["context_attention", "memory_attention", "memory_context_attention"])
def test_gradient_of_strides_zero(operator: str) -> None:
    check_case(operator, getattr(kernels, operator), "odd", torch.float32, expand=True)
