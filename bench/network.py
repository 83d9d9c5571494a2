"""The whole network: rows of its forward pass, and of its training step with its parts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from simmp_fast.cli.info import multiply_adds
from simmp_fast.config import ModelConfig
from simmp_fast.model import SimMPNet

from . import backends, parity, steps, timing, tracing
from .backends import BASELINE, Backend
from .cases import STEP, Case
from .measure import Contender, Settings, dtype_name, fill_memory, time_together
from .problems import SEED, network_config
from .rows import FAILED, PASSED, Row
from .steps import Steps


@dataclass
class Network:
    """A model with a structured memory, and a batch.

    Attributes:
        model: in training mode.
        images: ``[B, C, S1, S1]`` float32.
        labels: ``[B, S1, S1]`` int64.
        autocast: dtype of autocast, None for none.
    """

    model: SimMPNet
    images: Tensor
    labels: Tensor
    autocast: torch.dtype | None

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.images.device

    def steps(self) -> Steps:
        """Its training step."""
        return Steps(self.model, self.images, self.labels, self.autocast)


def make(sizes: Any, dtype: torch.dtype, device: torch.device) -> Network:
    """A network past its warm-up, the same for the same sizes."""
    config = network_config(sizes["side"])
    torch.manual_seed(SEED)
    model = SimMPNet(config).to(device)
    for block in model.memory_blocks():
        block.bank.set_extra_state(torch.tensor(config.warmup_steps))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # every step of every backend meets the same numbers
    generator = torch.Generator().manual_seed(SEED)
    shape = (sizes["B"], config.in_channels, config.image_size, config.image_size)
    images = torch.rand(shape, generator=generator).to(device)
    labels = torch.randint(config.classes, (shape[0], *shape[2:]), generator=generator).to(device)
    half = dtype if dtype in (torch.bfloat16, torch.float16) else None
    return Network(model.train(), images, labels, half)


def measure_network(case: Case, dtype: torch.dtype, settings: Settings) -> list[Row]:
    """All rows of the whole network in one dtype: its forward pass, or its training step."""
    torch._dynamo.reset()
    contenders = [Contender(backend) for backend in settings.backends_of(case)]
    name = dtype_name(dtype)
    try:
        network = make(case.sizes, dtype, settings.device)
    except Exception as error:
        for contender in contenders:
            contender.fail(error)
        return [row_of(case, name, c, "both" if case.operator == STEP else "forward", settings) for c in contenders]
    measured = _measure_step if case.operator == STEP else _measure_forward
    return measured(case, name, network, contenders, settings)


def row_of(case: Case, dtype: str, contender: Contender, direction: str, settings: Settings, part: str = "") -> Row:
    """A row of the network, or of a part of its step, without times."""
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
        contender.enter(lambda backend: forward_call(network, backend))
        contender.attempt(_call_once)
        runner = contender.runner
        if runner is not None:
            contender.judge(lambda c=contender, r=runner: judge_forward(network, c.backend, r.forward))  # type: ignore[misc]
    time_together(contenders, settings)
    running = [c.runner for c in contenders if c.runner is not None]
    usual = next((r.samples["forward"] for r in running if r.name == BASELINE), None)
    rows = []
    for contender in contenders:
        runner = contender.runner
        row = row_of(case, dtype, contender, "forward", settings)
        if runner is not None:
            contender.watch("forward", runner.forward, settings.device)
            row.message = contender.verdict.message
            fill_memory(row, contender)
            fill(row, runner.samples["forward"], usual, case.sizes["B"])
        fill_roofline(row, network, settings, 1)
        rows.append(row)
    return rows


def judge_forward(network: Network, backend: Backend, call: Callable[[], Tensor]) -> parity.Verdict:
    """Parity of every operator call of one pass; a compiled form is compared with the eager one."""
    if backend.name == BASELINE:
        return parity.Verdict(PASSED)
    if backend.compiled:
        eager = forward_call(network, backends.BACKENDS[backend.door])
        spread = parity.nudged_spread(eager, network.model, network.autocast or torch.float32)
        return parity.agreement(call(), eager(), spread)
    with parity.recorded() as calls:
        call()
    network.model.discard_memory()
    return parity.judge_calls(calls, parity.door(backend.door, network.device, network.autocast))


def _measure_step(
    case: Case, dtype: str, network: Network, contenders: Sequence[Contender], settings: Settings
) -> list[Row]:
    found = steps.measure(network.steps(), contenders, settings)
    rows = []
    for contender in contenders:
        samples = found.get(contender.backend.name)
        if samples is None:
            rows.append(row_of(case, dtype, contender, "both", settings))
            continue
        for part, values in samples.items():
            if part and (contender.backend.compiled or contender.backend.replayed):
                continue  # such a step has no parts
            row = row_of(case, dtype, contender, "both", settings, part)
            fill(row, values, found.get(BASELINE, {}).get(part), case.sizes["B"] if not part else None)
            if not part:
                fill_memory(row, contender)
                if row.launches is None and not row.message:
                    row.message = tracing.NO_DEVICE
                fill_roofline(row, network, settings, 3)
            rows.append(row)
    return rows


def fill(row: Row, samples: Sequence[float], baseline: Sequence[float] | None, images: int | None) -> None:
    """Quantiles, the ratio to the baseline, and images a second."""
    row.p20_ms, row.median_ms, row.p80_ms = timing.quantiles(samples)
    row.samples_ms = [round(value, 6) for value in samples]
    if row.parity == PASSED and baseline and row.backend != BASELINE and min(samples) > 0:
        row.speedup_p20, row.speedup, row.speedup_p80 = timing.ratios(baseline, samples)
    if images is not None and row.median_ms > 0:
        row.rate = 1e3 * images / row.median_ms


def fill_roofline(row: Row, network: Network, settings: Settings, passes: int) -> None:
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
    with torch.device("meta"):
        return 2 * multiply_adds(SimMPNet(config))
