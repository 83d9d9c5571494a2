"""What the sanitizers run launches every kernel of the tables; what they look for is looked for here as well."""

from __future__ import annotations

import sys
from pathlib import Path

import bounds
import pytest
import torch
import triton
import triton.language as tl

sys.path.insert(0, str(Path(__file__).parents[2] / "gpu"))
from sanitized import CASES, launch

from simmp_fast.kernels.configs import rows

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")


def test_the_cases_launch_every_kernel(launched: list[str]) -> None:
    for operator, name in CASES:
        launch(operator, name, torch.float32, "cpu")
    assert set(launched) == {row.kernel for row in rows()}


@triton.jit
def _copy(source, target, READ: tl.constexpr, WRITTEN: tl.constexpr):
    index = tl.arange(0, 8)
    tl.store(target + index, tl.load(source + index, mask=index < READ, other=0.0), mask=index < WRITTEN)


@pytest.mark.parametrize(("read", "written"), [(6, 5), (5, 6)])
def test_an_element_beside_a_tensor_is_seen(read: int, written: int) -> None:
    source, target = torch.ones(2, 8)[:, :5].unbind()
    with bounds.within("copy", [source, target]):
        _copy[(1,)](source, target, READ=5, WRITTEN=5)
        with pytest.raises(Exception, match="copy touches 1 elements outside of its tensors"):
            _copy[(1,)](source, target, READ=read, WRITTEN=written)
