"""A case becomes rows: problem, parity, time, memory, launches. Nothing that goes wrong in it stops the run."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from . import backends, memory, parity, problems, timing, tracing
from .backends import BASELINE, Backend
from .cases import Case
from .formulas import FORMULAS
from .roofline import Roofline
from .rows import FAILED, OUT_OF_MEMORY, PASSED, Row

DIRECTIONS = ("forward", "backward", "both")


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        device: where.
        dtypes: of the inputs; a case is measured in each.
        backends: names; all that can run here by default.
        directions: which rows to keep.
        seconds: time to spend on one case in one dtype, beyond its warm-up.
        roofline: the measured ceilings, None to leave shares out.
        environment: goes into every row.
        fast: tiny sizes: nothing is compiled by default.
        baseline: measure the reference too, for speed-ups, where it is not asked for by name.
    """

    device: torch.device
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    backends: tuple[str, ...] = ()
    directions: tuple[str, ...] = DIRECTIONS
    seconds: float = 2.0
    roofline: Roofline | None = None
    environment: dict[str, Any] = field(default_factory=dict)
    fast: bool = False
    baseline: bool = True

    def backends_of(self, case: Case) -> list[Backend]:
        """Who is measured in a case."""
        return backends.choose(self.backends, self.device, case.operator, case.compiled, self.baseline)


@dataclass
class Contender:
    """A backend in one case, and what became of it."""

    backend: Backend
    runner: timing.Runner | None = None
    status: str = ""
    message: str = ""
    verdict: parity.Verdict = field(default_factory=parity.Verdict)
    peaks: dict[str, int | None] = field(default_factory=dict)
    counts: dict[str, tuple[int, int] | None] = field(default_factory=dict)

    def enter(self, call_of: Callable[[Backend], Callable[[], Tensor]], leaves: Sequence[Tensor] = ()) -> None:
        """Make the call to measure, which may fail already."""
        try:
            self.runner = timing.Runner(self.backend.name, call_of(self.backend), leaves)
        except Exception as error:
            self.fail(error)

    def judge(self, verdict_of: Callable[[], parity.Verdict]) -> None:
        """Fill in the verdict; a check that fails itself is none, and its time can be told all the same."""
        try:
            self.verdict = verdict_of()
        except Exception as error:
            status, message = describe(error)
            self.verdict = parity.Verdict(message=f"parity: {status}, {message}")

    def watch(self, direction: str, call: Callable[[], object], device: torch.device) -> None:
        """Peak memory, launches and waits of a call."""

        def look() -> None:
            self.peaks[direction] = memory.peak_bytes(call, device)
            self.counts[direction] = tracing.count(call, device)

        self.beside("memory and launches", look)

    def beside(self, what: str, step: Callable[[], None]) -> None:
        """Find out something beside the time, which can be told without it."""
        try:
            step()
        except Exception as error:
            self.note(f"{what}: {describe(error)[1]}")

    def note(self, text: str) -> None:
        """Add to the message of its rows."""
        self.verdict = replace(self.verdict, message="; ".join(filter(None, (self.verdict.message, text))))

    def fail(self, error: BaseException) -> None:
        """Keep the reason instead of the result."""
        self.runner = None
        self.status, self.message = describe(error)

    def attempt(self, step: Callable[[timing.Runner], None]) -> None:
        """Run a step of the measurement unless an earlier one failed."""
        if self.runner is None:
            return
        try:
            step(self.runner)
        except Exception as error:
            self.fail(error)


def describe(error: BaseException) -> tuple[str, str]:
    """Status and message of a row whose measurement raised."""
    if memory.is_out_of_memory(error):
        return OUT_OF_MEMORY, "memory ran out"
    first = (str(error).strip().splitlines() or [""])[0]
    return FAILED, f"{type(error).__name__}: {first}"[:300]


def dtype_name(dtype: torch.dtype) -> str:
    """``"float32"``."""
    return str(dtype).removeprefix("torch.")


def release(device: torch.device) -> None:
    """Give memory of the last case back."""
    if device.type == "cuda":
        gc.collect()
        with contextlib.suppress(RuntimeError):  # after an illegal access nothing can be given back: see `broken`
            torch.cuda.empty_cache()


def broken(device: torch.device) -> str | None:
    """Why nothing more can be measured by this process: an illegal access ends all use of a GPU. None if it can."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError as error:
        return describe(error)[1]
    return None


def measure_case(case: Case, dtype: torch.dtype, settings: Settings) -> list[Row]:
    """All rows of an operator's or a module's case in one dtype."""
    device = settings.device
    torch._dynamo.reset()
    contenders = [Contender(backend) for backend in settings.backends_of(case)]
    try:
        problem = problems.make(case.operator, case.sizes, dtype, device)
    except Exception as error:
        for contender in contenders:
            contender.fail(error)
        return rows_of(case, dtype_name(dtype), contenders, settings, ())
    for contender in contenders:
        contender.enter(problem.output, problem.leaves)
        contender.attempt(_call_once)
        release(device)
    judge(problem, contenders)
    release(device)
    time_together(contenders, settings, hide_host=True)
    for contender in contenders:
        contender.attempt(lambda runner, c=contender: _watch(runner, c, device))  # type: ignore[misc]
        release(device)
    wanted = DIRECTIONS if problem.leaves else DIRECTIONS[:1]
    return rows_of(case, dtype_name(dtype), contenders, settings, wanted)


def _call_once(runner: timing.Runner) -> None:
    """Forward and backward, which compiles what is to be compiled."""
    output = runner.forward()
    if runner.leaves:
        runner.backward(output, None if output.dim() == 0 else torch.ones_like(output))
    if output.device.type == "cuda":
        torch.cuda.synchronize(output.device)


def judge(problem: problems.Problem, contenders: Sequence[Contender]) -> None:
    """Fill in the verdicts on all contenders that run."""
    for contender in contenders:
        if contender.runner is not None:
            contender.judge(lambda backend=contender.backend: parity.judge(problem, backend))  # type: ignore[misc]


def time_together(contenders: Sequence[Contender], settings: Settings, hide_host: bool = False) -> None:
    """Time those that run in turns; one that fails meanwhile is left out from there on.

    Args:
        contenders: of one case.
        settings: how.
        hide_host: see `timing.measure`.
    """
    runners = [c.runner for c in contenders if c.runner is not None]
    failures = timing.measure(runners, settings.device, settings.seconds, hide_host)
    for contender in contenders:
        if contender.backend.name in failures:
            contender.fail(failures[contender.backend.name])


def _watch(runner: timing.Runner, contender: Contender, device: torch.device) -> None:
    """Peak memory, launches and waits of the forward pass, and of both passes, in passes of their own."""

    def both() -> None:
        output = runner.forward()
        runner.backward(output, None if output.dim() == 0 else torch.ones_like(output))

    calls: dict[str, Callable[[], object]] = {"forward": runner.forward}
    if runner.leaves:
        calls["both"] = both
    for direction, call in calls.items():
        contender.watch(direction, call, device)


def rows_of(
    case: Case, dtype: str, contenders: Sequence[Contender], settings: Settings, directions: Sequence[str]
) -> list[Row]:
    """The rows of a case: one for each contender and direction, a single one where it failed."""
    baseline = next((c for c in contenders if c.backend.name == BASELINE), None)
    rows = []
    for contender in contenders:
        verdict = contender.verdict
        wanted = [d for d in directions if d in settings.directions] if contender.runner is not None else []
        for direction in wanted or [directions[-1] if directions else "forward"]:
            row = Row(
                case.operator, case.group, case.label, case.uses, contender.backend.name, direction, dict(case.sizes),
                dtype, environment=settings.environment,
            )  # fmt: skip
            row.parity, row.message = verdict.status, verdict.message
            if contender.runner is None:
                row.status, row.message = contender.status, contender.message
            elif contender.runner.samples:
                samples = contender.runner.samples[direction]
                usual = None if baseline is None or baseline.runner is None else baseline.runner.samples[direction]
                fill_times(row, samples, usual)
                fill_memory(row, contender)
            fill_roofline(row, case, dtype, settings)
            rows.append(row)
    return rows


def fill_times(row: Row, samples: Sequence[float], baseline: Sequence[float] | None) -> None:
    """Quantiles, and the ratio to the baseline where parity allows one."""
    row.p20_ms, row.median_ms, row.p80_ms = timing.quantiles(samples)
    row.samples_ms = [round(sample, 6) for sample in samples[: timing.MOST_ROUNDS]]
    if row.parity == PASSED and baseline is not None and row.backend != BASELINE:
        row.speedup_p20, row.speedup, row.speedup_p80 = timing.ratios(baseline, samples)


def fill_memory(row: Row, contender: Contender) -> None:
    """Peak memory, launches and waits. The peak of a backward pass counts what its forward pass keeps for it."""
    peaks, counts = contender.peaks, contender.counts
    row.peak_bytes = peaks.get("forward" if row.direction == "forward" else "both")
    forward, both = counts.get("forward"), counts.get("both")
    if row.direction == "forward" and forward is not None:
        row.launches, row.syncs = forward
    elif row.direction == "both" and both is not None:
        row.launches, row.syncs = both
    elif forward is not None and both is not None:
        row.launches, row.syncs = both[0] - forward[0], both[1] - forward[1]


def fill_roofline(row: Row, case: Case, dtype: str, settings: Settings) -> None:
    """Bytes and operations by formula, and the share of the ceiling that they imply."""
    if case.operator not in FORMULAS:
        return
    cost = FORMULAS[case.operator].of(row.direction, case.sizes, getattr(torch, dtype).itemsize)
    row.bytes, row.flops = cost.bytes, cost.flops
    if settings.roofline is None or dtype not in settings.roofline.matrix_rate:
        return
    row.roofline_ms, row.bound = settings.roofline.bound(cost, dtype)
    if row.median_ms:
        row.roofline_share = row.roofline_ms / row.median_ms
