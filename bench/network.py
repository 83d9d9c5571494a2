"""The whole network: its forward pass, and the training step with its parts."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from simmp_fast import ops
from simmp_fast.cli.info import multiply_adds
from simmp_fast.config import ModelConfig, TrainConfig
from simmp_fast.model import SimMPNet
from simmp_fast.training.step import FiniteGuard, make_optimizer

from . import backends, memory, parity, timing, tracing
from .backends import BASELINE, Backend
from .cases import PARTS, STEP, WITHOUT_BACKBONE, Case
from .measure import Contender, Settings, describe, dtype_name, fill_memory, release, time_together
from .parts import PartClock, by_part, wrap
from .problems import SEED, network_config
from .rows import FAILED, PASSED, Row


@dataclass
class Network:
    """A model with a structured memory, a batch, and the pieces of its training step.

    Attributes:
        model: in training mode.
        images: ``[B, C, S1, S1]`` float32.
        labels: ``[B, S1, S1]`` int64.
        autocast: dtype of autocast, None for none.
        compiled: forward and loss under `torch.compile`, by backend name.
    """

    model: SimMPNet
    images: Tensor
    labels: Tensor
    autocast: torch.dtype | None
    optimizer: torch.optim.AdamW
    guard: FiniteGuard
    compiled: dict[str, Callable[..., Tensor]]

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.images.device

    def loss(self, door: str) -> Tensor:
        """Forward pass and loss on one backend."""
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            heads = self.model(self.images, native_heads=True)
            return ops.powerset_loss(heads, self.labels, backend=door)

    def step(self, backend: Backend, clock: PartClock | None = None) -> Tensor:
        """One training step, as `simmp_fast.training.step` takes it; returns the loss."""
        clock = PartClock(timing.Clock(torch.device("cpu"))) if clock is None else clock
        self.model.backend = backend.door
        clock.start()
        with clock.part("optimiser"):
            self.optimizer.zero_grad(set_to_none=True)
        loss = self._forward(backend, clock)
        loss.backward()
        clock.rest()
        loss = loss.detach()
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        keep = self.guard.check(loss, [p.grad for p in parameters if p.grad is not None], 0)
        with clock.part("memory_update"):
            self.model.commit_memory(keep=keep)
        with clock.part("optimiser"):
            self.optimizer.step()
        self.model.wld.step(loss)
        return loss

    def _forward(self, backend: Backend, clock: PartClock) -> Tensor:
        if backend.compiled:
            if backend.name not in self.compiled:
                self.compiled[backend.name] = backends.compiled(self.loss)
            return self.compiled[backend.name](backend.door)
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            heads = self.model(self.images, native_heads=True)
            loss = wrap(ops.powerset_loss, "loss", clock)(heads, self.labels, backend=backend.door)
        return loss  # type: ignore[no-any-return]


def make(sizes: Any, dtype: torch.dtype, device: torch.device) -> Network:
    """A network past its warm-up, the same for the same sizes."""
    config = network_config(sizes["side"])
    torch.manual_seed(SEED)
    model = SimMPNet(config).to(device)
    for block in model.memory_blocks():
        block.bank.set_extra_state(torch.tensor(config.warmup_steps))
    generator = torch.Generator().manual_seed(SEED)
    shape = (sizes["B"], config.in_channels, config.image_size, config.image_size)
    images = torch.rand(shape, generator=generator).to(device)
    labels = torch.randint(config.classes, (shape[0], *shape[2:]), generator=generator).to(device)
    half = dtype if dtype in (torch.bfloat16, torch.float16) else None
    # A tiny rate: the weights stay where they are, so that every step of every backend meets the same numbers.
    optimizer = make_optimizer(model, replace(TrainConfig(), lr=1e-12))
    guard = FiniteGuard(device)
    optimizer.found_inf = guard.frozen  # type: ignore[attr-defined]
    return Network(model.train(), images, labels, half, optimizer, guard, {})


def measure_network(case: Case, dtype: torch.dtype, settings: Settings) -> list[Row]:
    """All rows of the whole network in one dtype: its forward pass, or its training step."""
    chosen = backends.choose(settings.backends, settings.device, case.operator, case.compiled)
    torch._dynamo.reset()
    contenders = [Contender(backend) for backend in chosen]
    name = dtype_name(dtype)
    try:
        network = make(case.sizes, dtype, settings.device)
    except Exception as error:
        for contender in contenders:
            contender.fail(error)
        return [_row(case, name, c, "both" if case.operator == STEP else "forward", settings) for c in contenders]
    measured = _measure_step if case.operator == STEP else _measure_forward
    return measured(case, name, network, contenders, settings)


def _row(case: Case, dtype: str, contender: Contender, direction: str, settings: Settings, part: str = "") -> Row:
    row = Row(
        f"{case.operator}.{part}" if part else case.operator, case.group, case.label, case.uses,
        contender.backend.name, direction, dict(case.sizes), dtype, environment=settings.environment,
    )  # fmt: skip
    row.parity, row.message = contender.verdict.status, contender.verdict.message
    if contender.status:
        row.status, row.message = contender.status, contender.message
    return row


def _call_once(runner: timing.Runner) -> None:
    runner.forward()


def forward_call(network: Network, backend: Backend) -> Callable[[], Tensor]:
    """The forward pass in evaluation mode: takes nothing, returns the finest head."""
    model = network.model.eval()
    run = backends.compiled(model) if backend.compiled else model

    @torch.no_grad()
    def call() -> Tensor:
        model.backend = backend.door
        with torch.autocast(network.device.type, network.autocast, enabled=network.autocast is not None):
            finest: Tensor = run(network.images, native_heads=True)[-1]
        return finest

    return call


def _measure_forward(
    case: Case, dtype: str, network: Network, contenders: Sequence[Contender], settings: Settings
) -> list[Row]:
    for contender in contenders:
        contender.runner = timing.Runner(contender.backend.name, forward_call(network, contender.backend))
        contender.attempt(_call_once)
        if contender.runner is not None:
            contender.verdict = judge_forward(network, contender.backend, contender.runner.forward)
    time_together(contenders, settings)
    running = [c.runner for c in contenders if c.runner is not None]
    usual = next((r.samples["forward"] for r in running if r.name == BASELINE), None)
    rows = []
    for contender in contenders:
        runner = contender.runner
        row = _row(case, dtype, contender, "forward", settings)
        if runner is not None:
            contender.peaks["forward"] = memory.peak_bytes(runner.forward, settings.device)
            contender.counts["forward"] = tracing.count(runner.forward, settings.device)
            fill_memory(row, contender)
            _fill(row, runner.samples["forward"], usual, case.sizes["B"])
        _roofline(row, network, settings, 1)
        rows.append(row)
    return rows


def judge_forward(network: Network, backend: Backend, call: Callable[[], Tensor]) -> parity.Verdict:
    """Parity of every operator call of one pass; a compiled form is compared with the eager one."""
    if backend.name == BASELINE:
        return parity.Verdict(PASSED)
    if backend.compiled:
        network.model.backend = backend.door
        with (
            torch.no_grad(),
            torch.autocast(network.device.type, network.autocast, enabled=network.autocast is not None),
        ):
            eager = network.model(network.images, native_heads=True)[-1]
        with torch.no_grad():
            return parity.agreement(call(), eager)
    with parity.recorded() as calls:
        call()
    network.model.discard_memory()
    return judge_on(backend, calls, network.autocast, network.device)


def judge_on(
    backend: Backend, calls: Sequence[parity.Call], autocast: torch.dtype | None, device: torch.device
) -> parity.Verdict:
    """The verdict on the recorded calls of a network, each made again on its own tensors."""

    def candidate(operator: str, **arguments: Any) -> Any:
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            return getattr(ops, operator)(**arguments, backend=backend.door)

    return parity.judge_calls(calls, candidate)


def _measure_step(
    case: Case, dtype: str, network: Network, contenders: Sequence[Contender], settings: Settings
) -> list[Row]:
    found: dict[str, dict[str, list[float]]] = {}
    for contender in contenders:
        step = functools.partial(network.step, contender.backend)
        try:
            loss = float(step())
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss}")
            contender.verdict = judge_step(network, contender.backend)
            network.optimizer.zero_grad(set_to_none=True)
            contender.peaks["both"] = memory.peak_bytes(step, settings.device)
            contender.counts["both"] = tracing.count(step, settings.device)
            found[contender.backend.name] = {part: [] for part in ("", WITHOUT_BACKBONE, *PARTS)}
        except Exception as error:
            network.model.discard_memory()
            contender.status, contender.message = describe(error)
        release(settings.device)
    _take_turns(network, [c.backend for c in contenders if c.backend.name in found], found, settings)
    rows = []
    for contender in contenders:
        samples = found.get(contender.backend.name)
        if samples is None:
            rows.append(_row(case, dtype, contender, "both", settings))
            continue
        for part, values in samples.items():
            if contender.backend.compiled and part:
                continue  # a compiled step has no parts
            row = _row(case, dtype, contender, "both", settings, part)
            _fill(row, values, found.get(BASELINE, {}).get(part), case.sizes["B"] if not part else None)
            if not part:
                fill_memory(row, contender)
                if row.launches is None and not row.message:
                    row.message = tracing.NO_DEVICE
                _roofline(row, network, settings, 3)
            rows.append(row)
    return rows


def judge_step(network: Network, backend: Backend) -> parity.Verdict:
    """Parity of every operator call of one step, the memory's update included."""
    if backend.name == BASELINE:
        return parity.Verdict(PASSED)
    if backend.compiled:
        # Both from the same memory: a step changes it.
        before = [buffer.clone() for buffer in network.model.buffers()]
        loss = network.step(backend)
        for buffer, value in zip(network.model.buffers(), before, strict=True):
            buffer.copy_(value)
        return parity.agreement(loss, network.step(backends.BACKENDS[backend.door]))
    with parity.recorded() as calls:
        network.step(backend)
    return judge_on(backend, calls, network.autocast, network.device)


def _take_turns(
    network: Network, running: Sequence[Backend], found: dict[str, dict[str, list[float]]], settings: Settings
) -> None:
    """Fill in the milliseconds of every part, backend after backend in every round."""
    clock = PartClock(timing.Clock(settings.device))
    spent = rounds = 0.0
    while running and (rounds < timing.LEAST_ROUNDS or (spent < settings.seconds and rounds < timing.MOST_ROUNDS)):
        for backend in running if rounds % 2 == 0 else running[::-1]:
            with contextlib.nullcontext() if backend.compiled else by_part(network.model, clock):
                network.step(backend, clock)
            parts = clock.stop()
            total = sum(parts.values())
            spent += total / 1e3
            parts |= {"": total, WITHOUT_BACKBONE: total - parts["backbone"]}
            for part, value in parts.items():
                found[backend.name][part].append(value)
        rounds += 1


def _fill(row: Row, samples: Sequence[float], baseline: Sequence[float] | None, images: int | None) -> None:
    """Quantiles, the ratio to the baseline, and images a second."""
    row.p20_ms, row.median_ms, row.p80_ms = timing.quantiles(samples)
    row.samples_ms = [round(value, 6) for value in samples]
    if row.parity == PASSED and baseline and row.backend != BASELINE and min(samples) > 0:
        row.speedup_p20, row.speedup, row.speedup_p80 = timing.ratios(baseline, samples)
    if images is not None and row.median_ms > 0:
        row.rate = 1e3 * images / row.median_ms


def _roofline(row: Row, network: Network, settings: Settings, passes: int) -> None:
    """Operations of all products and convolutions; a training step counts three times its forward pass.

    No least traffic is given: it would be that of every layer, whatever is fused.
    """
    row.flops = passes * _forward_operations(network.model.config) * row.shape["B"]
    if settings.roofline is None or row.dtype not in settings.roofline.matrix_rate or row.status == FAILED:
        return
    row.roofline_ms, row.bound = 1e3 * row.flops / settings.roofline.matrix_rate[row.dtype], "compute"
    if row.median_ms:
        row.roofline_share = row.roofline_ms / row.median_ms


@functools.cache
def _forward_operations(config: ModelConfig) -> int:
    """Operations of one image's forward pass."""
    return 2 * multiply_adds(SimMPNet(config))
