"""The package works where Triton is not installed; asking for the kernels then is an error that says why."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import torch
import simmp_fast
from simmp_fast import ops
x = torch.randn(1, 4, 8)
assert ops.context_attention(x, x, x).shape == x.shape
try:
    ops.context_attention(x, x, x, backend="triton")
except ops.BackendError as error:
    assert "Triton is not installed" in str(error), error
else:
    raise AssertionError("backend='triton' ran without Triton")
assert "simmp_fast.kernels" not in sys.modules
"""


def test_without_triton() -> None:
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
