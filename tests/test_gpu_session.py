"""What `tests/gpu/conftest.py` does when a test loses the GPU: with a stand-in for torch, in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

CONFTEST = Path(__file__).parent / "gpu" / "conftest.py"
TORCH = """
class cuda:
    used, lost = False, False
    is_available = staticmethod(lambda: False)
    is_initialized = staticmethod(lambda: cuda.used)

    @staticmethod
    def synchronize():
        if cuda.lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\\nCUDA kernel errors\\nmore")
"""
TESTS = """
import os
import pytest
import torch

def test_before():
    torch.cuda.used = True

def test_that_goes_astray():
    torch.cuda.used = torch.cuda.lost = True

def test_after():
    assert not torch.cuda.lost

def test_that_skips():
    pytest.skip("not today")

def test_wrong():
    assert 1 == 2, "one is not two"

@pytest.fixture
def broken():
    raise OSError("no such device")

def test_without_its_fixture(broken):
    pass
"""


def session(folder: Path, tests: str, *arguments: str) -> tuple[subprocess.CompletedProcess[str], list[dict]]:
    """A session with that conftest, and its log."""
    shutil.copy(CONFTEST, folder / "conftest.py")
    (folder / "torch.py").write_text(TORCH, encoding="utf-8")
    (folder / "test_fake.py").write_text(tests, encoding="utf-8")
    log = folder / "log.jsonl"
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "COV"))}
    environment = {**kept, "SIMMP_FAST_TEST_LOG": str(log), "PYTHONPATH": str(folder)}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--rootdir={folder}", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    return done, [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def outcomes(log: list[dict]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in log:
        found.setdefault(line["test"].partition("::test_")[2], []).append(line["outcome"])
    return found


def test_the_session_ends_with_the_device(tmp_path: Path) -> None:
    done, log = session(tmp_path, TESTS)
    assert done.returncode == 1
    assert outcomes(log) == {"before": ["started", "passed"], "that_goes_astray": ["started", "failed"]}
    assert "illegal memory access" in log[-1]["message"]
    assert "lost the GPU, no test after it can use it: RuntimeError: CUDA error" in done.stdout


@pytest.mark.skipif(find_spec("xdist") is None, reason="pytest-xdist is not installed")
def test_another_process_takes_the_tests_that_are_left(tmp_path: Path) -> None:
    done, log = session(tmp_path, TESTS, "-p", "xdist", "-n", "1")
    assert done.returncode == 1
    assert outcomes(log) == {
        "before": ["started", "passed"],
        "that_goes_astray": ["started", "failed"],
        "after": ["started", "passed"],
        "that_skips": ["started", "skipped"],
        "wrong": ["started", "failed"],
        "without_its_fixture": ["started", "error"],
    }
    assert "FAILED test_fake.py::test_after" not in done.stdout
    workers = {line["test"].partition("::test_")[2]: line["worker"] for line in log}
    assert workers["that_goes_astray"] == "gw0"
    assert workers["after"] == "gw1"


def test_the_log(tmp_path: Path) -> None:
    """Without a device nothing is lost; a test that ends its process has begun and not ended."""
    tests = TESTS.replace("torch.cuda.used = torch.cuda.lost = True", "pass") + "\ndef test_last():\n    os._exit(3)\n"
    done, log = session(tmp_path, tests)
    assert done.returncode == 3
    assert outcomes(log)["last"] == ["started"]
    ended = {line["test"].partition("::test_")[2]: line for line in log if line["outcome"] != "started"}
    assert ended["wrong"]["message"].startswith("AssertionError: one is not two")
    assert ended["without_its_fixture"]["message"] == "OSError: no such device"
    assert ended["that_skips"]["message"].endswith("not today")
    assert ended["before"]["message"] == ""
    assert all(line["seconds"] >= 0 for line in ended.values())


def test_a_demand_for_a_gpu(tmp_path: Path) -> None:
    done, log = session(tmp_path, TESTS, "--require-gpu")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "--require-gpu: no kernel can run here: no CUDA device is present" in done.stderr
    assert log == []
