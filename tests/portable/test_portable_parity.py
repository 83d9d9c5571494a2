"""The portable operators against the definition, on every registered case in every dtype."""

from __future__ import annotations

import pytest
import torch
from parity import CASES, case_names, check_case

from simmp_fast import portable

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
EVERY_CASE = [(operator, name) for operator in sorted(CASES) for name in case_names(operator)]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize(("operator", "name"), EVERY_CASE, ids=lambda value: str(value))
def test_case(operator: str, name: str, dtype: torch.dtype) -> None:
    check_case(operator, getattr(portable, operator), name, dtype)


EXPANDED = [(operator, "odd") for operator in ("context_attention", "memory_attention", "powerset_loss")]
EXPANDED += [("context_attention", "long"), ("memory_attention", "long"), ("memory_context_attention", "long")]
EXPANDED += [("split_attention", "odd_paper"), ("split_attention", "long_released"), ("powerset_loss", "native")]


@pytest.mark.parametrize(("operator", "name"), EXPANDED)
def test_expanded_cotangent(operator: str, name: str) -> None:
    check_case(operator, getattr(portable, operator), name, torch.float32, expand=True)
