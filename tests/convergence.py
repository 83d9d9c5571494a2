"""Training runs that differ in rounding alone: how far apart they drift, and which discrete choices they make.

A run is some tens of steps on slices of the demo's template. The yardstick is the definition itself, started again
from parameters moved by one unit in the last place: what that does to losses, parameters and choices is what rounding
does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from simmp_fast import ops
from simmp_fast.config import ModelConfig, TrainConfig
from simmp_fast.data.cache import Cache, is_cache
from simmp_fast.data.demo import DemoSource
from simmp_fast.data.loader import slice_loader
from simmp_fast.data.prepare import prepare
from simmp_fast.model import SimMPNet
from simmp_fast.training.step import TrainStep, make_optimizer

Batch = tuple[Tensor, Tensor]
Choice = tuple[str, Tensor]
# Runs of the definition from other starts, by the seeds 0 to NUDGES - 1.
NUDGES = 8
# How many times the definition's own spread a run may reach, as in the parity of one operator.
TIMES = 2
# Runs part where a near-tie falls the other way; that may happen so many steps sooner than in the nudged runs.
SOONER = 4


@dataclass(frozen=True)
class Outcome:
    """What a run left: ``losses [steps]``, parameters and memory banks as vectors, and the choices of every step."""

    losses: Tensor
    parameters: Tensor
    banks: Tensor
    choices: list[list[Choice]]


def batches(folder: Path, image_size: int, batch_size: int, steps: int) -> list[Batch]:
    """The batches of a run: the demo's training slices, without augmentation, epoch after epoch.

    `folder` is a prepared cache of the demo, or where one is made.
    """
    cache = Cache.open(folder) if is_cache(folder) else prepare(DemoSource(), folder, image_size, progress=False)
    found: list[Batch] = []
    epoch = 0
    while len(found) < steps:
        found += slice_loader(cache, "train", batch_size, epoch=epoch, augment=False)
        epoch += 1
    return found[:steps]


def _far_sets(row_mean: Tensor, threshold: Tensor) -> Tensor:
    return (row_mean.unsqueeze(-1) - row_mean.unsqueeze(-2)).abs() >= threshold.unsqueeze(-1)


def _chosen(name: str, inputs: tuple[Any, ...], result: Any) -> Tensor | None:
    """The discrete choice in the result of an operator, as a tensor that two runs can be compared by."""
    if name in ("memory_attention", "memory_context_attention"):
        return result[1]
    if name == "update_memory":
        return (result[0] != inputs[1]).any(-1)
    if name == "decay_weights":
        return result[..., 0] < 1
    if name == "split_threshold":
        return _far_sets(*result)
    return None


NAMES = {
    "memory_attention": "clusters",
    "memory_context_attention": "clusters",
    "update_memory": "slots",
    "decay_weights": "windows",
    "split_threshold": "splits",
}


@contextmanager
def recorded(choices: list[Choice]) -> Iterator[None]:
    """Append the choice of every operator call made by a network."""
    plain = {name: getattr(ops, name) for name in NAMES}

    def wrap(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            result = plain[name](*args, **kwargs)
            chosen = _chosen(name, args, result)
            assert chosen is not None
            choices.append((NAMES[name], chosen.detach().cpu()))
            return result

        return call

    for name in NAMES:
        setattr(ops, name, wrap(name))
    try:
        yield
    finally:
        for name, function in plain.items():
            setattr(ops, name, function)


def _nudge(model: SimMPNet, seed: int) -> None:
    """Move every trained parameter to a neighbouring float32, up or down at random."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            up = torch.rand(parameter.shape, generator=generator).to(parameter.device) < 0.5
            target = torch.where(up, torch.inf, -torch.inf).to(parameter.dtype)
            parameter.copy_(torch.nextafter(parameter, target))


def _vector(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().double().flatten().cpu() for tensor in tensors])


def run(
    config: ModelConfig,
    train: TrainConfig,
    data: list[Batch],
    backend: str,
    device: torch.device,
    nudged: int | None = None,
) -> Outcome:
    """Train from one start; with `nudged`, from one moved by a unit in the last place, up or down by this seed."""
    torch.manual_seed(0)
    model = SimMPNet(config, backend).to(device).train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()  # statistics over a handful of values would turn rounding into other signs
    if nudged is not None:
        _nudge(model, nudged)
    train = replace(train, backend=backend)
    step = TrainStep(model, make_optimizer(model, train), train, device)
    losses, choices = [], []
    for index, (images, labels) in enumerate(data):
        choices.append([])
        torch.manual_seed(index)  # stochastic depth draws the same blocks in every run
        with recorded(choices[-1]):
            losses.append(step(images, labels, index, wld=True).cpu())
    parameters = _vector(model.parameters())
    banks = _vector(tensor for block in model.memory_blocks() for tensor in block.bank.buffers())
    return Outcome(torch.stack(losses).double(), parameters, banks, choices)


@dataclass(frozen=True)
class Drift:
    """How far two runs are apart.

    Attributes:
        losses: ``[steps]``, the largest relative difference of the loss up to each step.
        parameters: norm of the difference of the parameters over the norm of the parameters.
        banks: the same of memory and prototypes.
        choices: share of differing choices by kind, over all steps.
        first: share of differing choices by kind, in the first step.
    """

    losses: Tensor
    parameters: float
    banks: float
    choices: dict[str, float]
    first: dict[str, float]


def _differing(one: list[list[Choice]], other: list[list[Choice]]) -> dict[str, float]:
    """Share of the choices that differ, by kind."""
    counts = {name: [0, 0] for name in NAMES.values()}
    for mine, yours in zip(one, other, strict=True):
        for (name, a), (same, b) in zip(mine, yours, strict=True):
            assert name == same
            counts[name][0] += int((a != b).sum())
            counts[name][1] += a.numel()
    return {name: differing / max(1, total) for name, (differing, total) in counts.items()}


def drift(one: Outcome, other: Outcome) -> Drift:
    """Compare two runs of the same length on the same data."""
    return Drift(
        ((one.losses - other.losses).abs() / other.losses).cummax(0).values,
        ((one.parameters - other.parameters).norm() / other.parameters.norm()).item(),
        ((one.banks - other.banks).norm() / other.banks.norm()).item(),
        _differing(one.choices, other.choices),
        _differing(one.choices[:1], other.choices[:1]),
    )


def spread(runs: list[Outcome]) -> Drift:
    """The largest drift between any two runs of the definition."""
    drifts = [drift(one, other) for one, other in combinations(runs, 2)]
    return Drift(
        torch.stack([d.losses for d in drifts]).amax(0),
        max(d.parameters for d in drifts),
        max(d.banks for d in drifts),
        {name: max(d.choices[name] for d in drifts) for name in NAMES.values()},
        {name: max(d.first[name] for d in drifts) for name in NAMES.values()},
    )


def excess(found: Drift, allowed: Drift) -> list[str]:
    """In what a run is further from the definition than `TIMES` its own spread; empty where it stays within."""
    losses = [*allowed.losses[SOONER:].tolist(), *[allowed.losses[-1].item()] * SOONER]
    wrong = [
        f"loss of step {step}: {mine:.2e}, allowed {TIMES} x {theirs:.2e}"
        for step, (mine, theirs) in enumerate(zip(found.losses.tolist(), losses, strict=True))
        if not mine <= TIMES * theirs + 1e-6
    ][:1]
    for what in ("parameters", "banks"):
        mine, theirs = getattr(found, what), getattr(allowed, what)
        if not mine <= TIMES * theirs:
            wrong.append(f"{what}: {mine:.2e}, allowed {TIMES} x {theirs:.2e}")
    for when, own, definitions in (
        ("all steps", found.choices, allowed.choices),
        ("the first step", found.first, allowed.first),
    ):
        wrong += [
            f"{name} of {when}: {own[name]:.2%} differ, allowed {TIMES} x {definitions[name]:.2%}"
            for name in own
            if not own[name] <= TIMES * definitions[name] + 1e-3
        ]
    return wrong


def judged(train: Callable[[int | None], Outcome], definition: Outcome, allowed: Drift) -> list[str]:
    """What is wrong with the runs that `train` makes from a start; empty where nothing is.

    Of the nudged definition's own runs a few in a hundred part from the others early. A run that exceeds its spread is
    therefore repeated from another start: that rarely happens twice, and a fault is there both times.
    """
    for start in (None, NUDGES):
        wrong = excess(drift(train(start), definition), allowed)
        if not wrong:
            break
    return wrong
