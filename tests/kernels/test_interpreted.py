"""Runs every file of `interpreted/` in its own process: the interpreter must be chosen before Triton is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

triton = pytest.importorskip("triton")

FOLDER = Path(__file__).parent / "interpreted"


def interpreter_works() -> bool:
    """Triton 3.6's interpreter takes arrays of one element for numbers, which NumPy refuses from 2.4 on."""
    versions = [tuple(map(int, module.__version__.split(".")[:2])) for module in (triton, np)]
    return versions[0] >= (3, 7) or versions[1] < (2, 4)


@pytest.mark.skipif(
    not interpreter_works(),
    reason=f"the interpreter of Triton {triton.__version__} does not work with NumPy {np.__version__}, only below 2.4",
)
@pytest.mark.parametrize("path", sorted(FOLDER.glob("test_*.py")), ids=lambda p: p.stem)
def test_interpreted(path: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(path)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=1800)
    if result.returncode == pytest.ExitCode.NO_TESTS_COLLECTED:  # the whole file skipped itself
        pytest.skip(result.stdout.partition("SKIPPED ")[2].strip() or result.stdout)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
