"""The training step in one form, in a process of its own: ``python -m bench.form --backend triton-graph --out DIR``.

`simmp-fast bench training_step` lets all forms take turns and has their rows when the last one is through. Here a form
is alone, and neither a crash nor a long compilation costs another one its row. The row goes to the end of
`results.jsonl` as soon as the steps are timed, and again with what is found after that: launches and waits, parity.
`simmp-fast bench --merge` makes one report of such results and fills in the speed-ups.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from simmp_fast.cli.common import choose_device
from simmp_fast.config import ConfigError

from . import environment, memory, network, profile, steps, timing, tracing
from .backends import BACKENDS, BASELINE, Backend, one
from .cases import CPU_BATCH, GPU_BATCH, STEP, Case, registry
from .measure import Contender, Settings, describe, dtype_name, fill_memory
from .report import size
from .rows import OK, PARITY_FAILED, RESULTS, Row, append

PROFILED = 3  # steps


@dataclass(frozen=True)
class Plan:
    """How much to do.

    Attributes:
        steps: to time.
        warmup: least number of steps before; a replayed step takes as many as lead to a replay.
        profile: folder for the profile; None for none.
        parity: judge the step, in so far as it is not the reference itself, and count its operations.
    """

    steps: int = 20
    warmup: int = 3
    profile: Path | None = None
    parity: bool = True


class Form:
    """A backend's training step in one dtype, and what is known of it.

    Args:
        backend: what takes the steps.
        case: of the training step.
        settings: device and environment, and one dtype.
        say: called with what is done next.
    """

    def __init__(self, backend: Backend, case: Case, settings: Settings, say: Callable[[str], None]) -> None:
        self.backend, self.case, self.settings, self.say = backend, case, settings, say
        (self.dtype,) = settings.dtypes
        self.device = settings.device
        self.contender = Contender(backend)
        self.samples: list[float] = []
        self._stage, self._whole = "", False

    def stage(self, text: str) -> None:
        """What is done from here on; a failure names it."""
        self._stage = text
        self.say(text)

    def row(self) -> Row:
        """All that is known so far."""
        row = network.row_of(self.case, dtype_name(self.dtype), self.contender, "both", self.settings)
        fill_memory(row, self.contender)
        if self.samples:
            network.fill(row, self.samples, None, self.case.sizes["B"])
        if self._whole:
            network.fill_roofline(row, self.network, self.settings, 3)
        return row

    def measure(self, plan: Plan, keep: Callable[[Row], object]) -> Row:
        """Time the step, then find out the rest; a failure is a row like any other.

        Args:
            plan: how much.
            keep: called with the row when the time is there, and after everything that was added to it.
        """
        try:
            self.stage("make the network")
            self.network = network.make(self.case.sizes, self.dtype, self.device)
            self.steps = self.network.steps()
            self._take = functools.partial(self.steps.take, self.backend)
            self._warm_up(plan)
            self._time(plan)
        except BaseException as error:  # an interrupted form leaves its row too
            self.contender.status, message = describe(error)
            self.contender.message = f"{message} ({self._stage})"
            self.say(traceback.format_exc())
            keep(self.row())
            if isinstance(error, Exception):
                return self.row()
            raise
        keep(self.row())
        for _ in self._beside_the_time(plan):
            keep(self.row())
        return self.row()

    def _beside_the_time(self, plan: Plan) -> Iterator[None]:
        """Find out the rest, what is wanted most first; yields where the row has changed."""
        self.stage("count launches and waits")
        self.contender.beside("launches", self._count)
        yield
        if plan.profile is not None:
            self.stage("profile")
            self.contender.beside("profile", functools.partial(self._profile, plan.profile))
            yield
        if plan.parity or self.backend.name == BASELINE:
            self.stage("judge parity")
            noted = self.contender.verdict.message
            self.contender.judge(lambda: steps.judge(self.steps, self.backend))
            self.contender.note(noted)
            yield
        if not plan.parity:  # a form that is measured against the clock
            return
        self.stage("count operations")
        self.contender.beside("operations", self._count_operations)
        yield

    def _warm_up(self, plan: Plan) -> None:
        self.stage("take the first step")
        self._take()
        self._check()
        self.stage("measure the peak of memory")
        # A graph keeps its memory from one replay to the next: the peak is that of a step before its capture.
        self.contender.peaks["both"] = memory.peak_bytes(self._take, self.device)
        self.stage("warm up")
        self.steps.reach_replay(self.backend)
        for _ in range(max(plan.warmup - 2, 1)):
            self._take()

    def _time(self, plan: Plan) -> None:
        """Milliseconds of every step. The host waits for nothing meanwhile, as in training."""
        self.stage(f"time {plan.steps} steps")
        clock = timing.Clock(self.device)
        marks = [clock.mark()]
        for _ in range(plan.steps):
            self._take()
            marks.append(clock.mark())
        clock.wait()
        found = [clock.between(start, stop) for start, stop in itertools.pairwise(marks)]
        self._check()
        self.samples = found

    def _check(self) -> None:
        """Loss and gradients of all steps so far are finite."""
        bad = self.steps.of(self.backend).guard.read()
        if bad is not None:
            raise FloatingPointError(bad.describe())

    def _count(self) -> None:
        self.contender.counts["both"] = tracing.count(self._take, self.device)

    def _count_operations(self) -> None:
        network.fill_roofline(self.row(), self.network, self.settings, 3)
        self._whole = True

    def _profile(self, folder: Path) -> None:
        found = profile.listen(self._take, self.device, PROFILED)
        title = profile.title_of(self.backend, self.dtype, self.case.sizes["B"])
        name = f"profile-{self.backend.name}-{dtype_name(self.dtype)}"
        self.say(profile.save(found, title, self.settings.environment, folder, name))


def case_of(device: torch.device, batch: int | None, side: int) -> Case:
    """The case of the training step, as the registry has it, with images of another size where asked for."""
    batch = batch or (GPU_BATCH if device.type == "cuda" else CPU_BATCH)
    found = next(case for case in registry(device.type, batch) if case.operator == STEP and case.group == "step")
    return Case(STEP, {**found.sizes, "side": side}, found.group, found.label, found.uses)


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.form", description="measure the training step of the synapse preset in one form"
    )
    add = parser.add_argument
    add("--backend", required=True, help=f"one of {', '.join(BACKENDS)}")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="(default: bfloat16)")
    add("--batch", type=int, default=None, help=f"images (default: {GPU_BATCH} on a GPU, {CPU_BATCH})")
    add("--side", type=int, default=256, help="of the images (default: 256; below, the small network)")
    add("--steps", type=int, default=Plan.steps, help=f"steps to time (default: {Plan.steps})")
    add("--warmup", type=int, default=Plan.warmup, help=f"least steps before (default: {Plan.warmup})")
    add("--profile", action="store_true", help="profile it too: profile-BACKEND-DTYPE.md and .json")
    add("--no-parity", action="store_true", help="neither judge the step (no speed-up then) nor count its operations")
    add("--device", default=None, help="such as cpu or cuda:0 (default: a GPU if there is one)")
    add("--out", type=Path, default=Path("bench-results"), help="folder (default: bench-results)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns 2 for a wrong argument, 1 for a row without a time or with failed parity."""
    options = parsed(arguments)
    try:
        for name in ("steps", "warmup", "batch"):
            value = getattr(options, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name}: got {value}, expected at least 1")
        device = choose_device(options.device)
        backend = one(options.backend, device, STEP)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    begun = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - begun:6.1f} s] {text}", flush=True)

    settings = Settings(
        device, (getattr(torch, options.dtype),), (backend.name,), environment=environment.describe(device)
    )
    form = Form(backend, case_of(device, options.batch, options.side), settings, say)
    plan = Plan(options.steps, options.warmup, options.out if options.profile else None, not options.no_parity)
    with memory.bounded(device):
        row = form.measure(plan, lambda row: append(options.out / RESULTS, row))
    if row.status == OK:
        say(
            f"{backend.name} {options.dtype}: {row.median_ms:.2f} ms a step ({row.p20_ms:.2f} to {row.p80_ms:.2f}), "
            f"{row.rate:.1f} images a second, peak {size(row.peak_bytes)}, parity {row.parity} {row.message}"
        )
    else:
        say(f"{backend.name} {options.dtype}: {row.status}: {row.message}")
    return int(row.status != OK or row.parity == PARITY_FAILED)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what `timeout` sends: the row tells how far it came
    sys.exit(main())
