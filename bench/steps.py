"""The training step on every backend, whole and by its parts: the very `TrainStep` that training takes."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from simmp_fast.config import TrainConfig
from simmp_fast.model import SimMPNet
from simmp_fast.training.replay import Recorder
from simmp_fast.training.step import TrainStep, make_optimizer

from . import backends, memory, parity, timing, tracing
from .backends import BASELINE, Backend
from .cases import PARTS, WITHOUT_BACKBONE
from .measure import Contender, Settings, describe, dtype_name, release
from .parts import PartClock, by_part
from .rows import PASSED

# Learning rate: the weights stay where they are, so that every step of every backend meets the same numbers.
NO_RATE = 1e-12


@dataclass
class Steps:
    """One network's training step on any backend.

    Attributes:
        model: in training mode, its memory structured. Backends with another layout of the weights have a copy of it.
        images: ``[B, C, S1, S1]`` float32.
        labels: ``[B, S1, S1]`` int64.
        autocast: dtype of autocast, None for none; the steps refuse one that training does not offer.
        recorder: makes what captures a replayed step; CUDA graphs by default.
    """

    model: SimMPNet
    images: Tensor
    labels: Tensor
    autocast: torch.dtype | None
    recorder: Callable[[], Recorder] | None = None
    _made: dict[str, TrainStep] = field(default_factory=dict, repr=False)

    @property
    def product_dtype(self) -> torch.dtype:
        """The dtype of the matrix products."""
        return self.autocast or torch.float32

    def of(self, backend: Backend) -> TrainStep:
        """The step that a backend takes."""
        if backend.name not in self._made:
            config = replace(
                TrainConfig(),
                lr=NO_RATE,
                precision=dtype_name(self.product_dtype),
                backend=backend.door,
                compile=backend.compiled,
                channels_last=backend.channels_last,
                cuda_graph=backend.replayed and self.recorder is None,
            )
            model = copy.deepcopy(self.model) if backend.channels_last else self.model
            recorder = self.recorder() if backend.replayed and self.recorder is not None else None
            optimizer = make_optimizer(model, config)
            self._made[backend.name] = TrainStep(model, optimizer, config, self.images.device, recorder)
        return self._made[backend.name]

    def take(self, backend: Backend) -> Tensor:
        """One step; returns its loss."""
        step = self.of(backend)
        step.model.backend = backend.door
        return step(self.images, self.labels, 0, wld=True)

    def reach_replay(self, backend: Backend) -> None:
        """Take steps until a replayed one is a replay; none where steps are not replayed."""
        replays = self.of(backend).replays
        while replays is not None and not replays.replaying:
            self.take(backend)

    def forget(self, backend: Backend) -> None:
        """Give free what a backend's step holds."""
        step = self._made.pop(backend.name, None)
        if step is not None:
            step.model.discard_memory()
            step.optimizer.zero_grad(set_to_none=True)


def measure(steps: Steps, contenders: Sequence[Contender], settings: Settings) -> dict[str, dict[str, list[float]]]:
    """Parity, memory, launches and time of every contender.

    Returns:
        milliseconds of every round, by backend and part; "" is the whole step. A backend that failed is missing.
    """
    found: dict[str, dict[str, list[float]]] = {}
    for contender in contenders:
        backend = contender.backend
        try:
            _prepare(steps, contender, settings)
            found[backend.name] = {part: [] for part in ("", WITHOUT_BACKBONE, *PARTS)}
        except Exception as error:
            contender.status, contender.message = describe(error)
            steps.forget(backend)
        release(settings.device)
    _take_turns(steps, [c for c in contenders if c.backend.name in found], found, settings)
    return found


def _prepare(steps: Steps, contender: Contender, settings: Settings) -> None:
    """Everything about a contender but its time."""
    backend = contender.backend
    take = functools.partial(steps.take, backend)
    loss = float(take())
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss}")
    steps.of(backend).optimizer.zero_grad(set_to_none=True)
    # A graph keeps its memory from one replay to the next: the peak is that of the step before its capture.
    contender.peaks["both"] = memory.peak_bytes(take, settings.device)
    steps.reach_replay(backend)
    contender.judge(lambda: judge(steps, backend))
    contender.beside("launches", lambda: contender.counts.update(both=tracing.count(take, settings.device)))


def judge(steps: Steps, backend: Backend) -> parity.Verdict:
    """Parity of every operator call of one step, the memory's update included.

    A step whose calls cannot be listened to, compiled or replayed, is compared with the eager one by its loss.
    """
    if backend.name == BASELINE:
        return parity.Verdict(PASSED)
    if backend.compiled or backend.replayed:
        eager = backends.BACKENDS[backend.door]
        before = [buffer.clone() for buffer in steps.model.buffers()]

        def again(taking: Backend) -> Tensor:
            """The loss from the same memory: a step changes it."""
            for buffer, value in zip(steps.of(taking).model.buffers(), before, strict=True):
                buffer.copy_(value)
            return steps.take(taking)

        spread = parity.nudged_spread(lambda: again(eager), steps.of(eager).model, steps.product_dtype)
        return parity.agreement(again(backend), again(eager), spread)
    with parity.recorded() as calls:
        steps.take(backend)
    return parity.judge_calls(calls, parity.door(backend.door, steps.images.device, steps.autocast))


def _take_turns(
    steps: Steps, running: Sequence[Contender], found: dict[str, dict[str, list[float]]], settings: Settings
) -> None:
    """Fill in the milliseconds of every part, backend after backend in every round; one that fails is taken out."""
    clock = PartClock(timing.Clock(settings.device))
    spent = rounds = 0.0
    while found and (rounds < timing.LEAST_ROUNDS or (spent < settings.seconds and rounds < timing.MOST_ROUNDS)):
        for contender in running if rounds % 2 == 0 else running[::-1]:
            name = contender.backend.name
            if name not in found:
                continue
            try:
                parts = _timed(steps, contender.backend, clock)
            except Exception as error:
                contender.status, contender.message = describe(error)
                del found[name]
                steps.forget(contender.backend)
                continue
            spent += parts[""] / 1e3
            for part, value in parts.items():
                found[name][part].append(value)
        rounds += 1


def _timed(steps: Steps, backend: Backend, clock: PartClock) -> dict[str, float]:
    """Milliseconds of one step and of its parts."""
    whole = backend.compiled or backend.replayed
    with contextlib.nullcontext() if whole else by_part(steps.of(backend), clock):
        clock.start()
        steps.take(backend)
        parts = clock.stop()
    total = sum(parts.values())
    return parts | {"": total, WITHOUT_BACKBONE: total - parts["backbone"]}
