"""A pytest plugin for tests on the null GPU: everything runs, no result is judged.

A failed assertion there says nothing, since nothing was computed: such a test passes, marked as not judged. Any other
exception fails it. The parity checks, which stop at the first difference, only run their operators.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Parity checks that only call."""
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
        item.user_properties.append(("nullgpu", "not judged"))
        outcome.force_result(None)
