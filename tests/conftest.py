"""Settings for all tests, made before torch is imported."""

from __future__ import annotations

import os
import signal
from types import ModuleType

import pytest

# The tensors of the tests are small: on a busy machine two threads wait for each other longer than they compute, and
# results that do not depend on the number of cores can be compared between machines. Child processes inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# cuBLAS is deterministic with a fixed workspace alone, and has to know before its first product.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# What `nohup` and background jobs of a shell ignore, a program that respects that would not hear in its tests.
for _name in ("SIGINT", "SIGHUP", "SIGTERM"):
    _number = getattr(signal, _name, None)
    if _number is not None and signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, signal.default_int_handler if _name == "SIGINT" else signal.SIG_DFL)

# Files whose tests take minutes each.
_LONG = ("test_interpreted.py", "test_faults_survival.py", "test_train_replay.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests first: at the end one process would work at them while the others have nothing left to do."""
    items.sort(key=lambda item: item.path.name not in _LONG)


@pytest.fixture
def nibabel() -> ModuleType:
    """nibabel; where it is not installed, a test that reads or writes NIfTI files skips itself."""
    return pytest.importorskip("nibabel", reason="NIfTI files need nibabel")
