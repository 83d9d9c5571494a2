"""Training with the portable operators and with the kernels stays as close to the definition as rounding lets it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from convergence import NUDGES, Batch, Drift, Outcome, batches, judged, run, spread

from simmp_fast import ops
from simmp_fast.config import ModelConfig, TrainConfig

pytest.importorskip("nilearn", reason="the demo's template comes with nilearn")
interpreter = pytest.importorskip("triton.runtime.interpreter")
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")

# The small preset's network at sizes that the interpreter can bear: its time goes by programs.
MODEL = ModelConfig(
    classes=4,
    image_size=32,
    dmwla_size=64,
    backbone="maxvit_rmlp_pico_rw_256",
    depths=(1, 1, 1, 1),
    clusters=3,
    feature_dim=16,
    decoder_clusters=3,
    decoder_feature_dim=16,
    slots=8,
    warmup_steps=4,
)
TRAIN = TrainConfig(lr=3e-4)
CPU = torch.device("cpu")
# The first four fill the memory. Later, rounding grows until every run goes its own way, and two of them say little.
STEPS = 16
# The same kernels with larger tiles than the pinned ones: fewer programs, fewer turns of their loops.
TILES = {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_P": 1024, "TILE_Y": 32, "TILE_X": 32, "BLOCK": 1024}


def with_larger_tiles(pick: Callable[..., Any]) -> Callable[..., Any]:
    def larger(*arguments: Any) -> Any:
        config = pick(*arguments)
        return replace(config, tiles={name: TILES.get(name, size) for name, size in config.tiles.items()})

    return larger


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[Batch]:
    return batches(tmp_path_factory.mktemp("demo") / "cache", MODEL.image_size, 2, STEPS)


@pytest.fixture(scope="module")
def definition(data: list[Batch]) -> Outcome:
    return run(MODEL, TRAIN, data, "reference", CPU)


@pytest.fixture(scope="module")
def allowed(data: list[Batch], definition: Outcome) -> Drift:
    return spread([definition, *(run(MODEL, TRAIN, data, "reference", CPU, nudged=seed) for seed in range(NUDGES))])


@pytest.fixture
def equal_rows_have_equal_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products are added up in float64 and rounded once.

    The slices' background gives many tokens that are the same to the last bit, and row means that are exact ties. A
    GPU and PyTorch keep them; NumPy's float32 product rounds equal rows differently, by where they lie in the matrix
    and by the processor, and the split of DS-GIM then falls the other way from one step on.
    """

    def create_dot(_: Any, a: Any, b: Any, d: Any, *__: Any) -> Any:
        assert {a.data.dtype, b.data.dtype, d.data.dtype} == {np.dtype(np.float32)}
        product = a.data.astype(np.float64) @ b.data.astype(np.float64)
        return interpreter.TensorHandle((product + d.data).astype(np.float32), d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


@pytest.fixture(autouse=True)
def fresh_memory_is_nan() -> None:
    """Not here: the backbone's own operators need not be deterministic, and the parity tests look at every element."""


def test_the_start_decides_the_run(data: list[Batch], definition: Outcome) -> None:
    again = run(MODEL, TRAIN, data, "reference", CPU)
    assert torch.equal(again.losses, definition.losses)
    assert torch.equal(again.parameters, definition.parameters)


def test_portable(data: list[Batch], definition: Outcome, allowed: Drift) -> None:
    assert not judged(partial(run, MODEL, TRAIN, data, "portable", CPU), definition, allowed)


@pytest.mark.usefixtures("kernels_take_cpu_tensors", "equal_rows_have_equal_products")
def test_kernels(data: list[Batch], definition: Outcome, allowed: Drift, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("attention", "powerset_loss"):
        module = importlib.import_module(f"simmp_fast.kernels.{name}.operators")
        monkeypatch.setattr(module, "pick", with_larger_tiles(module.pick))
    assert not judged(partial(run, MODEL, TRAIN, data, "triton", CPU), definition, allowed)


@pytest.mark.parametrize("fault", ["scores one per cent too large", "a gradient lost", "another slot written"])
def test_the_measure_sees_a_fault(
    data: list[Batch], definition: Outcome, allowed: Drift, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    context, update = ops.context_attention, ops.update_memory
    if fault.startswith("scores"):
        monkeypatch.setattr(ops, "context_attention", lambda q, k, v, **o: context(q * 1.01, k, v, **o))
    elif fault.startswith("a gradient"):
        monkeypatch.setattr(ops, "context_attention", lambda q, k, v, **o: context(q, k.detach(), v, **o))
    else:
        monkeypatch.setattr(ops, "update_memory", lambda t, m, p, k, **o: (update(t, m, p, k, **o)[0].roll(1, 1), p))
    assert judged(partial(run, MODEL, TRAIN, data, "reference", CPU), definition, allowed)
