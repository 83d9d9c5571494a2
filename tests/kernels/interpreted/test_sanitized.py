"""What the sanitizers run launches every kernel of the tables."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "gpu"))
from sanitized import CASES, launch

from simmp_fast.kernels.configs import rows

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")


def test_the_cases_launch_every_kernel(launched: list[str]) -> None:
    for operator, name in CASES:
        launch(operator, name, torch.float32, "cpu")
    assert set(launched) == {row.kernel for row in rows()}
