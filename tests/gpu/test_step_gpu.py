"""The training step on a GPU: it never waits, and replayed from a CUDA graph it does what it does eagerly."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
from training_stubs import tiny_config

from simmp_fast.config import Config
from simmp_fast.model import SimMPNet
from simmp_fast.training.replay import EAGER_CALLS
from simmp_fast.training.step import TrainStep, make_optimizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is present"),
]
pytest.importorskip("triton")

WARMUP = EAGER_CALLS + 3
STEPS = 2 * WARMUP


def config_of(**train: Any) -> Config:
    """A rate that moves no weight: backward passes of PyTorch's own layers add in any order, forward passes do not."""
    config = tiny_config(backend="triton", lr=1e-30, weight_decay=0.0, **train)
    return replace(config, model=replace(config.model, warmup_steps=WARMUP))


def make(config: Config) -> TrainStep:
    torch.manual_seed(0)
    device = torch.device("cuda")
    model = SimMPNet(config.model, backend=config.train.backend).to(device).train()
    return TrainStep(model, make_optimizer(model, config.train), config.train, device)


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(2, 1, 64, 64, generator=generator)
    return images.pin_memory(), torch.randint(3, (2, 64, 64), generator=generator).pin_memory()


def taken(step: TrainStep) -> dict[str, Tensor]:
    """Losses of the warm-up and of some steps after it, and the memory that they leave."""
    losses = [step(*batch(number), number, wld=False) for number in range(STEPS)]
    assert step.guard.read() is None
    kept = {name: value for name, value in step.model.state_dict().items() if "bank" in name or "momentum" in name}
    return {"losses": torch.stack(losses), **kept}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("options", [{}, {"channels_last": True}], ids=str)
def test_replayed_steps_equal_eager_ones(precision: str, options: dict[str, Any]) -> None:
    eager = taken(make(config_of(precision=precision, **options)))
    step = make(config_of(precision=precision, cuda_graph=True, **options))
    found = taken(step)
    assert step.replays is not None
    assert step.replays.replaying
    assert [name for name in eager if not torch.equal(found[name], eager[name])] == []


@pytest.mark.compiles
def test_replayed_compiled_steps_equal_the_steps_before() -> None:
    """Two replays against two eager steps from the same state: the network is compiled once, for one phase."""
    config = config_of(precision="bfloat16", cuda_graph=True, compile=True, channels_last=True)
    step = make(config)
    for block in step.model.memory_blocks():
        block.bank.set_extra_state(torch.tensor(WARMUP))
    assert step.replays is not None

    def two_from(state: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors = step.model.state_dict()
        for name, value in state.items():
            tensors[name].copy_(value)
        torch.manual_seed(1)
        losses = [step(*batch(number), number, wld=False) for number in range(2)]
        kept = {name: value.clone() for name, value in step.model.state_dict().items() if name in state}
        return {"losses": torch.stack(losses), **kept}

    memory = ("bank.memory", "bank.prototypes", "momentum_key")
    start = {name: value.clone() for name, value in step.model.state_dict().items() if name.endswith(memory)}
    eager = two_from(start)
    while not step.replays.replaying:
        step(*batch(0), 0, wld=False)
    found = two_from(start)
    assert step.guard.read() is None
    assert [name for name in eager if not torch.equal(found[name], eager[name])] == []
    assert any(not torch.equal(found[name], start[name]) for name in start), "the steps wrote to the memory"


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_a_step_never_waits_for_the_gpu(cuda_graph: bool) -> None:
    """Eager or replayed; a capture itself waits, and so does the structuring."""
    step = make(config_of(precision="bfloat16", cuda_graph=cuda_graph))
    batches = [batch(number) for number in range(STEPS)]
    for number in range(STEPS):
        captures = cuda_graph and number in (EAGER_CALLS, WARMUP + EAGER_CALLS)
        free = number >= 2 and number not in (WARMUP - 1, WARMUP) and not captures
        torch.cuda.set_sync_debug_mode("error" if free else "default")
        try:
            step(*batches[number], number, wld=True)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert step.guard.read() is None
