"""These files run Triton's interpreter: collected only with TRITON_INTERPRET=1 (see test_interpreted.py)."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from simmp_fast import ops

Launch = Callable[..., None]
# The modules of `simmp_fast.kernels` that launch.
LAUNCHING = (
    "assign_clusters",
    "attention.operators",
    "powerset_loss.operators",
    "split_attention.operators",
    "split_threshold",
    "update_memory.operator",
    "window_similarity",
)

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


@pytest.fixture(autouse=True, scope="session")
def spared_time() -> Iterator[None]:
    """What the interpreter would do again at every call is done once."""
    import sparing  # Triton, which the interpreter has to be chosen for

    with pytest.MonkeyPatch.context() as monkeypatch:
        sparing.spare(monkeypatch)
        yield


@pytest.fixture(autouse=True)
def fresh_memory_is_nan() -> Iterator[None]:
    """Deterministic mode fills fresh memory with NaN, so that anything a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def kernels_take_cpu_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the door pass CPU tensors to the interpreted kernels."""
    monkeypatch.setattr(ops, "why_not_triton", lambda *_: None)


@pytest.fixture
def wrap_launches(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Launch], Launch]], None]:
    """A function that puts a wrapper around the launch of every kernel."""

    def wrap(around: Callable[[Launch], Launch]) -> None:
        for name in LAUNCHING:
            module = importlib.import_module(f"simmp_fast.kernels.{name}")
            monkeypatch.setattr(module, "launch", around(module.launch))

    return wrap


@pytest.fixture
def launched(wrap_launches: Callable[[Callable[[Launch], Launch]], None]) -> list[str]:
    """The kernels launched from now on, by their names in the table."""
    names: list[str] = []

    def around(launch: Launch) -> Launch:
        def call(kernel: Any, grid: Any, config: Any, *rest: Any, **named: Any) -> None:
            names.append(config.kernel)
            launch(kernel, grid, config, *rest, **named)

        return call

    wrap_launches(around)
    return names


@pytest.fixture(autouse=True)
def within_their_tensors(wrap_launches: Callable[[Callable[[Launch], Launch]], None]) -> Iterator[None]:
    """No kernel touches a byte beside its tensors: what it reads there is often masked later, which hides it."""
    import bounds  # Triton, which the interpreter has to be chosen for

    wrap_launches(bounds.around)
    with bounds.checked():
        yield
