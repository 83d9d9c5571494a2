"""float32 kernels under TF32: held to the definition with every product's operands rounded to TF32, as cuBLAS does.

Matrix units are not here; what TF32 loses is in its operands, and those can be rounded on a CPU on both sides.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from parity import build, check_inputs
from tf32 import Tf32Products, rounded

sys.path.insert(0, str(Path(__file__).parents[1]))
import dmwla_cases
import dsgim_cases

from simmp_fast import kernels
from simmp_fast.kernels import rounding

dmwla_cases.register()
dsgim_cases.register()

CASES = [
    *(("context_attention", name) for name in ("odd", "fused", "dim_96", "dim_192", "dim_256")),
    *(("memory_attention", name) for name in ("odd", "fixed_cluster", "dim_80", "dim_256", "slots_133")),
    *(("memory_context_attention", name) for name in ("past_a_tile", "dim_96", "dim_130", "dim_256")),
    *(("split_attention", name) for name in ("first_image_released", "key_offset", "dim_384")),
]
# Cases with enough elements that the largest error is no accident.
TELLING = [
    ("context_attention", "dim_96"),
    ("memory_attention", "dim_256"),
    ("memory_context_attention", "dim_256"),
    ("split_attention", "dim_384"),
]


@pytest.fixture(autouse=True)
def tf32() -> Iterator[None]:
    """PyTorch's products are set to TF32; it matters here for the kernels' dtype class alone."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


def check(operator: str, name: str, candidate: Callable[..., Any] | None = None) -> None:
    inputs = build(operator, name, seed=0, dtype=torch.float32, device="cpu")
    with Tf32Products() as mode:
        check_inputs(operator, candidate or getattr(kernels, operator), inputs, f"{operator}[{name}, tf32]")
    assert mode.products > 0


@pytest.mark.parametrize(("operator", "name"), CASES)
def test_parity(operator: str, name: str) -> None:
    check(operator, name)


@triton.jit
def _truncate(tile):
    return (tile.to(tl.uint32, bitcast=True) & 0xFFFFE000).to(tl.float32, bitcast=True)


@pytest.mark.parametrize(("operator", "name"), TELLING)
def test_truncated_operands_are_seen(operator: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "to_tf32", _truncate)
    with pytest.raises(AssertionError, match="error"):
        check(operator, name)


@triton.jit
def _round(source, target, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    tl.store(target + place, rounding.to_tf32(tl.load(source + place)))


def test_rounding_is_to_nearest_ties_away_and_keeps_what_is_no_number() -> None:
    one = 2.0**-10
    inf, nan = float("inf"), float("nan")
    given = [1.0, 1 + one / 2, -1 - one / 2, 1 + 0.499 * one, 1 + one, 3 + one, 0.0, -0.0, 2.0**-149, inf, -inf, nan]
    wanted = [1.0, 1 + one, -1 - one, 1.0, 1 + one, 3 + 2 * one, 0.0, -0.0, 0.0, inf, -inf, nan]
    source, target = torch.zeros(16), torch.full((16,), nan)
    source[: len(given)] = torch.tensor(given)
    # A NaN with every bit set, which the sum with half a step would carry over into the sign.
    source.view(torch.int32)[12], source.view(torch.int32)[13] = 0x7FFFFFFF, -1
    _round[(1,)](source, target, SIZE=16)
    torch.testing.assert_close(target[: len(wanted)], torch.tensor(wanted), rtol=0, atol=0, equal_nan=True)
    assert target[12:14].isnan().all()
    values = torch.randn(4096, generator=torch.Generator().manual_seed(0)) * 2.0 ** torch.arange(4096).sub(2048).div(32)
    found = torch.full_like(values, nan)
    _round[(1,)](values, found, SIZE=4096)
    assert torch.equal(found, rounded(values))
