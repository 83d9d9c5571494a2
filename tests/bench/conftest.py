"""One fast run that the tests of the benchmark share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench import run
from bench.cases import select
from bench.measure import Settings
from bench.rows import Row


@pytest.fixture(scope="session")
def fast_rows() -> list[Row]:
    """Every tiny case on the CPU, in float32."""
    return run.run(select("cpu", fast=True), Settings(torch.device("cpu"), seconds=0.02, fast=True))


@pytest.fixture(scope="session")
def fast_results(fast_rows: list[Row], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that such a run writes."""
    folder = tmp_path_factory.mktemp("results")
    run.save(folder, fast_rows)
    return folder
