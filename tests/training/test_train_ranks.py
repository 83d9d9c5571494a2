"""Several processes train the network that one would, step by step."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from typing import Any

import processes
import pytest
import torch
from torch import Tensor
from training_stubs import tiny_config

from simmp_fast.model import SimMPNet
from simmp_fast.ranks import Ranks
from simmp_fast.training.distributed import prepare_model, share_random_state
from simmp_fast.training.step import TrainStep, make_optimizer

IMAGES = 6
STEPS = 4  # two of warm-up, the second of which structures the memory, and two updates of it


def make_step(ranks: Ranks, dtype: torch.dtype) -> TrainStep:
    config = tiny_config(backend="portable")
    torch.manual_seed(ranks.rank)  # weights and random state of rank 0 hold for all
    model = SimMPNet(replace(config.model, warmup_steps=2), backend="portable").to(dtype).train()
    prepare_model(model, ranks)
    share_random_state(ranks)
    return TrainStep(model, make_optimizer(model, config.train), config.train, torch.device("cpu"), ranks=ranks)


def batch(ranks: Ranks, step: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """This rank's images and labels."""
    generator = torch.Generator().manual_seed(step)
    images = torch.rand(IMAGES, 1, 64, 64, generator=generator).to(dtype)
    labels = torch.randint(3, (IMAGES, 64, 64), generator=generator)
    return images.tensor_split(ranks.size)[ranks.rank], labels.tensor_split(ranks.size)[ranks.rank]


def state_of(take_step: TrainStep) -> dict[str, Tensor]:
    """All that a step writes."""
    moments = {
        f"{name} {i}": value
        for i, values in take_step.optimizer.state_dict()["state"].items()
        for name, value in values.items()
    }
    return {name: value.clone() for name, value in (take_step.model.state_dict() | moments).items()}


def is_memory(name: str) -> bool:
    return "bank" in name or "momentum_key" in name or name.startswith("wld")


def bits(tensor: Tensor) -> bytes:
    return hashlib.blake2b(tensor.contiguous().numpy().tobytes()).digest()


def trained(ranks: Ranks) -> tuple[list[Tensor], list[dict[str, Tensor]], dict[str, Tensor], list[dict[str, bytes]]]:
    """Losses and the memory after each step, the last state (not from every rank), and the bits of every state."""
    take_step = make_step(ranks, torch.float64)
    for group in take_step.optimizer.param_groups:
        group["eps"] = 1e-3  # else a gradient that is zero but for rounding, as before a batch norm, moves a parameter
    losses, memories, digests = [], [], []
    for step in range(STEPS):
        losses.append(take_step(*batch(ranks, step, torch.float64), step, wld=True))
        state = state_of(take_step)
        memories.append({name: value for name, value in state.items() if is_memory(name)})
        digests.append({name: bits(value) for name, value in state.items()})
    return losses, memories, state if ranks.rank == 0 else {}, digests


@pytest.fixture(scope="module")
def by_one_process() -> Any:
    return processes.alone(trained)


@pytest.mark.parametrize("size", [2, 3])
def test_steps_are_those_of_one_process(by_one_process: Any, size: int) -> None:
    losses, memories, state, _ = by_one_process
    results = processes.run(trained, size)
    for others in results:
        assert all(torch.equal(a, b) for a, b in zip(others[0], results[0][0], strict=True))
        assert others[3] == results[0][3], "the same bits on every rank after every step"
    torch.testing.assert_close(torch.stack(results[0][0]), torch.stack(losses), rtol=1e-11, atol=0)
    assert len(memories) == STEPS
    assert len({bits(memory["decoder.attend.bank.memory"]) for memory in memories}) == STEPS, "each step writes"
    for got, expected in zip([*results[0][1], results[0][2]], [*memories, state], strict=True):
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            value, error = value.double(), (got[name].double() - value.double()).abs().max()
            assert error <= 1e-9 * max(1, value.abs().max()), f"{name}: {error}"


def poisoned(ranks: Ranks) -> tuple[list[int], list[bool]]:
    """The first bad step that the guard knows of after each step, and whether the step changed anything."""
    take_step = make_step(ranks, torch.float32)
    bad, moved = [], []
    for step in range(STEPS):
        before = state_of(take_step)
        images, labels = batch(ranks, step, torch.float32)
        if step == 2 and ranks.rank == ranks.size - 1:
            images[0, 0, 0, 0] = math.nan
        take_step(images, labels, step, wld=step < 3)
        bad.append(int(take_step.guard.step))
        after = state_of(take_step)
        written = [n for n in before if "running" not in n and "num_batches" not in n and "_extra_state" not in n]
        moved.append(any(not torch.equal(before[name], after[name]) for name in written))
    return bad, moved


def test_a_bad_image_on_one_rank_freezes_all() -> None:
    for found in processes.run(poisoned, 2):
        assert found == ([-1, -1, 2, 2], [True, True, False, False])
