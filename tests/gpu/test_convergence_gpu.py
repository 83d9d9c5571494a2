"""Training the small preset with real kernels stays as close to the definition as rounding lets it."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from convergence import NUDGES, Batch, batches, judged, run, spread

from simmp_fast.config import preset

# A prepared cache of the demo, for a machine without nilearn.
CACHE = os.environ.get("SIMMP_FAST_DEMO_CACHE")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.alone,
    pytest.mark.convergence,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is present"),
    pytest.mark.skipif(
        not CACHE and importlib.util.find_spec("nilearn") is None,
        reason="nilearn is not installed and SIMMP_FAST_DEMO_CACHE names no prepared cache of the demo",
    ),
]
pytest.importorskip("triton")
STEPS = 32


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[Batch]:
    folder = Path(CACHE) if CACHE else tmp_path_factory.mktemp("demo") / "cache"
    return batches(folder, preset("small").model.image_size, 8, STEPS)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_kernels_and_portable(data: list[Batch], precision: str) -> None:
    config = preset("small")
    model = replace(config.model, warmup_steps=4)
    train = replace(config.train, lr=3e-4, precision=precision)
    cuda = torch.device("cuda")
    definition = run(model, train, data, "reference", cuda)
    nudged = [run(model, train, data, "reference", cuda, nudged=seed) for seed in range(NUDGES)]
    allowed = spread([definition, *nudged])
    for backend in ("portable", "triton"):
        wrong = judged(partial(run, model, train, data, backend, cuda), definition, allowed)
        assert not wrong, f"{backend}: {wrong}"
