"""What the tests of the kernels on a GPU share: memory they may rely on, a device that works, and a log.

A kernel's illegal access shows at the next wait for the device and ends all use of it by the process: another test
would seem to fail, and every one after it. So each test waits for the device before it counts as passed, and a process
whose device is lost takes no further test.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

# A file that gets two lines of JSON a test, each as it happens: it started, and what became of it.
LOG = "SIMMP_FAST_TEST_LOG"
FIRST_LINES, LONGEST_LINE = 5, 300
_ORDER = ("passed", "skipped", "failed", "error")
_found = pytest.StashKey[dict[str, Any]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--require-gpu", action="store_true", help="fail, in place of skipping, where no kernel can run")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--require-gpu", False) and (reason := why_no_kernel()):
        raise pytest.UsageError(f"--require-gpu: no kernel can run here: {reason}")


def why_no_kernel() -> str | None:
    """Why the tests would skip themselves; None if they run."""
    if not torch.cuda.is_available():
        return "no CUDA device is present"
    from simmp_fast.ops import why_not_triton

    return why_not_triton(torch.device("cuda"))


def lost_device() -> str | None:
    """Why the GPU can no longer be used by this process; None if it can, or never was."""
    if not torch.cuda.is_initialized():
        return None
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return first_lines(error)
    return None


def first_lines(error: BaseException) -> str:
    """``RuntimeError: ...``, shortened."""
    lines = f"{type(error).__name__}: {error}".splitlines()[:FIRST_LINES]
    return "\n".join(line[:LONGEST_LINE] for line in lines)


def note(test: str, **values: object) -> None:
    """Append a line to the log, where there is one; processes that test together share it."""
    if path := os.environ.get(LOG):
        line = {"test": test, **values, "worker": os.environ.get("PYTEST_XDIST_WORKER", "")}
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """A test whose kernel went astray fails itself, not the one after it."""
    yield
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    outcome = "error" if report.failed and call.when != "call" else report.outcome
    found = item.stash[_found]
    if _ORDER.index(outcome) > _ORDER.index(found["outcome"]):
        found["outcome"] = outcome
        found["message"] = "" if call.excinfo is None else first_lines(call.excinfo.value)
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Log the test. Where it lost the device no other follows in this process: pytest-xdist starts a new one."""
    found = item.stash[_found] = {"outcome": "passed", "message": ""}
    note(item.nodeid, outcome="started")
    begun = time.monotonic()
    result = yield
    note(item.nodeid, outcome=found["outcome"], seconds=round(time.monotonic() - begun, 3), message=found["message"])
    lost = lost_device()
    if lost is not None:
        if hasattr(item.config, "workerinput"):
            # Its reports are sent. Within the protocol, so that the loss is told of this test and not of the next one.
            os._exit(1)
        item.session.shouldfail = f"{item.nodeid} lost the GPU, no test after it can use it: {lost.splitlines()[0]}"
    return result


@pytest.fixture
def fresh_memory_is_nan() -> Iterator[None]:
    """Deterministic mode fills fresh memory with NaN, so that anything a kernel leaves unwritten shows.

    It only warns of operators that have no deterministic form on a GPU: the definition uses such (the cross-entropy of
    maps, for one), and nothing here depends on their order of addition.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def needs_memory() -> Callable[[int], None]:
    """Skips the test unless so many bytes of the GPU are free now, whoever else uses it."""

    def check(wanted: int) -> None:
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        if free < wanted:
            pytest.skip(f"{free / 2**30:.1f} GiB of the GPU's memory are free, this needs {wanted / 2**30:.1f}")

    return check
