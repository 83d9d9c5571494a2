"""Which product a float32 operator takes, and where `auto` had better leave it to portable."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton")

from simmp_fast.kernels.launch import dot_precision, dtype_class
from simmp_fast.limits import FLOAT32_TAKES_PORTABLE, rather_portable


@pytest.fixture(params=["ieee", "tf32"])
def setting(request: pytest.FixtureRequest) -> Iterator[str]:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = request.param
    yield request.param
    torch.backends.cuda.matmul.fp32_precision = before


def test_float32_products_follow_the_setting(setting: str) -> None:
    assert dot_precision(dtype_class(torch.float32)) == setting


@pytest.mark.parametrize("operator", sorted(FLOAT32_TAKES_PORTABLE))
def test_attention_in_full_float32_is_left_to_portable(operator: str, setting: str) -> None:
    reason = rather_portable(operator, torch.float32)
    if setting == "tf32":
        assert reason is None
    else:
        assert reason is not None
        assert operator in reason
    assert rather_portable(operator, torch.bfloat16) is None


def test_other_operators_keep_their_kernels(setting: str) -> None:
    for operator in ("assign_clusters", "update_memory", "split_threshold", "powerset_loss"):
        assert rather_portable(operator, torch.float32) is None
