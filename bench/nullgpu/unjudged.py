"""A pytest plugin for tests on the null GPU: everything runs, no result is judged.

Nothing was computed, so a comparison says nothing, and must not keep a test from what it launches next: `torch.equal`
is true, and the parity checks, which stop at the first difference, only run their operators. An assertion that fails
all the same ends its test, which passes; the summary names the line. Any other exception fails the test.
"""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ENDED = "nullgpu: ended by an assertion"


def pytest_configure(config: pytest.Config) -> None:
    """Comparisons that hold, and parity checks that only call."""
    torch.equal = lambda input, other: True
    try:
        parity = importlib.import_module("parity")
    except ModuleNotFoundError:  # not this project's tests
        return

    def check_inputs(operator: str, candidate: Any, inputs: Any, what: str, *, expand: bool = False) -> None:
        if operator in parity.GRADIENTS:
            parity.named_gradients(operator, candidate, inputs, expand=expand)
        else:
            candidate(**inputs)

    def check_case(
        operator: str, candidate: Any, name: str, dtype: Any, device: str = "cpu", *, seed: int = 0,
        expand: bool = False,
    ) -> None:  # fmt: skip
        inputs = parity.build(operator, name, seed=seed, dtype=dtype, device=device)
        check_inputs(operator, candidate, inputs, "", expand=expand)

    parity.check_inputs, parity.check_case = check_inputs, check_case
    parity.check_assignment = lambda *_, **__: None


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Drop failed assertions."""
    outcome = yield
    error = outcome.excinfo
    if error is not None and issubclass(error[0], AssertionError):
        frames = traceback.extract_tb(error[2])
        inside = [frame for frame in frames if Path(frame.filename) == item.path] or frames[-1:]
        item.user_properties.append((ENDED, f"line {inside[-1].lineno}: {inside[-1].line}"))
        outcome.force_result(None)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The tests that an assertion ended: what they would have launched behind it has not been seen."""
    for report in terminalreporter.getreports("passed"):
        for name, where in report.user_properties:
            if name == ENDED:
                terminalreporter.write_line(f"not judged: {report.nodeid} ended at {where}")
