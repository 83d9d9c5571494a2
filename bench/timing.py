"""Time: all backends of a case take turns, so that a change of the machine meets them alike.

On a GPU by events, with the L2 cache overwritten before each direction and nothing waited for between rounds; on a CPU
by the clock. A round gives one number per backend and direction, and one ratio to the baseline.

A small kernel is done before the host has started the next one: events would then show the host's work. So where the
device is to be measured, it sleeps before each direction for longer than the host takes to start that direction, and
finds everything in its queue when it wakes. A sleep needs no more than a call, whatever that is; a CUDA graph of it
would be nearer to a replayed step, but what has a gradient, waits or allocates otherwise cannot all be captured.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

MOST_ROUNDS, LEAST_ROUNDS = 100, 3
# The device sleeps so many times as long as the host took, and no longer than so many seconds: who takes longer on the
# host waits for the device, or has kernels enough to keep it busy.
AHEAD, MOST_AHEAD = 2.0, 0.02
# Above the clock rate of any GPU there is: on a slower one the sleep is longer than asked for.
CYCLES_A_SECOND = 3e9


@dataclass
class Runner:
    """One contender: its call, and the gradients to take of what it returns.

    Attributes:
        name: backend.
        call: takes nothing, returns the output.
        leaves: gradients are taken with respect to these; empty for an operator without a backward pass.
        samples: milliseconds by direction, one number a round.
    """

    name: str
    call: Callable[[], Tensor]
    leaves: Sequence[Tensor] = ()
    samples: dict[str, list[float]] = field(default_factory=dict)

    def forward(self) -> Tensor:
        """The call, with what a backward pass needs where there is one."""
        with torch.set_grad_enabled(bool(self.leaves)):
            return self.call()

    def backward(self, output: Tensor, grad: Tensor | None) -> None:
        """Gradients of `output` with respect to all leaves; those that do not take part are skipped."""
        torch.autograd.grad(output, list(self.leaves), grad, allow_unused=True)


class Clock:
    """Marks points in time, on the host or in the device's stream."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cuda = device.type == "cuda"
        self._flush: Tensor | None = None  # made when needed: who wants cold caches has the memory for it

    def mark(self) -> float | torch.cuda.Event:
        """A point in time."""
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def cold(self, ahead: float = 0.0) -> None:
        """Overwrite the L2 cache of a GPU, which first sleeps for as long as the host may run ahead, in seconds."""
        if not self.cuda:
            return
        if self._flush is None:
            cache = int(getattr(torch.cuda.get_device_properties(self.device), "L2_cache_size", 2**26))
            self._flush = torch.empty(max(4 * cache, 2**28), dtype=torch.int8, device=self.device)
        if ahead:
            with torch.cuda.device(self.device):
                torch.cuda._sleep(int(ahead * CYCLES_A_SECOND))
        self._flush.zero_()

    def wait(self) -> None:
        """Until the device has done everything."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def between(self, start: float | torch.cuda.Event, stop: float | torch.cuda.Event) -> float:
        """Milliseconds; on a GPU only after `wait`."""
        if isinstance(start, float) and isinstance(stop, float):
            return 1e3 * (stop - start)
        assert isinstance(start, torch.cuda.Event)
        assert isinstance(stop, torch.cuda.Event)
        return float(start.elapsed_time(stop))


Marks = list[float | torch.cuda.Event]


@dataclass
class _Turns:
    """What is known of a runner while it takes turns."""

    grad: Tensor | None = None
    ahead: tuple[float, float] = (0.0, 0.0)
    marks: list[Marks] = field(default_factory=list)


def _turn(runner: Runner, clock: Clock, turns: _Turns) -> Marks:
    clock.cold(turns.ahead[0])
    marks = [clock.mark()]
    output = runner.forward()
    marks.append(clock.mark())
    if runner.leaves:
        clock.cold(turns.ahead[1])
        marks.append(clock.mark())
        runner.backward(output, turns.grad)
        marks.append(clock.mark())
    return marks


def _host_seconds(runner: Runner, clock: Clock, grad: Tensor | None) -> tuple[float, float]:
    """What the host needs to start the forward and the backward pass of a call."""
    clock.wait()
    start = time.perf_counter()
    output = runner.forward()
    middle = time.perf_counter()
    if runner.leaves:
        clock.wait()
        restart = time.perf_counter()
        runner.backward(output, grad)
        return middle - start, time.perf_counter() - restart
    return middle - start, 0.0


def _prepare(runner: Runner, clock: Clock, hide_host: bool) -> _Turns:
    turns = _Turns(_output_gradient(runner))
    if hide_host and clock.cuda:
        forward, backward = (min(AHEAD * s, MOST_AHEAD) for s in _host_seconds(runner, clock, turns.grad))
        turns.ahead = (forward, backward)
    return turns


def measure(
    runners: Sequence[Runner], device: torch.device, seconds: float, hide_host: bool = False
) -> dict[str, Exception]:
    """Fill `samples` of every runner.

    Args:
        runners: contenders; each was called at least once before.
        device: where they run.
        seconds: time to spend on all of them together, as far as 3 to 100 rounds allow.
        hide_host: on a GPU, count only the device's time: the host runs ahead.

    Returns:
        What ended a contender, by name; the others' rounds go on without it.
    """
    clock = Clock(device)
    turns: dict[str, _Turns] = {}
    failures: dict[str, Exception] = {}

    def attempt(step: Callable[[Runner], None], runner: Runner) -> None:
        try:
            step(runner)
        except Exception as error:
            failures[runner.name] = error

    def prepare(runner: Runner) -> None:
        turns[runner.name] = _prepare(runner, clock, hide_host)

    def running(order: Sequence[Runner]) -> list[Runner]:
        return [runner for runner in order if runner.name not in failures]

    def take(runner: Runner) -> None:
        turns[runner.name].marks.append(_turn(runner, clock, turns[runner.name]))

    for runner in runners:
        attempt(prepare, runner)
    start = time.perf_counter()
    for runner in running(runners):  # also the second warm-up
        attempt(take, runner)
    _settle(clock, running(runners), failures)
    spent = time.perf_counter() - start
    for kept in turns.values():
        kept.marks.clear()
    rounds = int(min(MOST_ROUNDS, max(LEAST_ROUNDS, seconds / max(spent, 1e-6))))
    for index in range(rounds):
        for runner in running(runners if index % 2 == 0 else runners[::-1]):
            attempt(take, runner)
    _settle(clock, running(runners), failures)
    for runner in running(runners):
        runner.samples = _samples(runner, clock, turns[runner.name].marks)
    return failures


def _settle(clock: Clock, running: Sequence[Runner], failures: dict[str, Exception]) -> None:
    """Wait for the device; an error that only shows now may be anyone's, so nobody's times are kept."""
    try:
        clock.wait()
    except Exception as error:
        failures.update({runner.name: error for runner in running})


def _samples(runner: Runner, clock: Clock, turns: Sequence[Marks]) -> dict[str, list[float]]:
    """Milliseconds of every round, by direction."""
    forward = [clock.between(marks[0], marks[1]) for marks in turns]
    if not runner.leaves:
        return {"forward": forward}
    backward = [clock.between(marks[2], marks[3]) for marks in turns]
    return {"forward": forward, "backward": backward, "both": [a + b for a, b in zip(forward, backward, strict=True)]}


def _output_gradient(runner: Runner) -> Tensor | None:
    """A gradient of the output's shape; None for a scalar, whose gradient is one."""
    if not runner.leaves:
        return None
    output = runner.forward()
    return None if output.dim() == 0 else torch.randn_like(output)


def quantiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """20th percentile, median, 80th percentile."""
    low, middle, high = np.percentile(samples, [20, 50, 80])
    return float(low), float(middle), float(high)


def ratios(baseline: Sequence[float], samples: Sequence[float]) -> tuple[float, float, float]:
    """Baseline over samples, round by round: 20th percentile, median, 80th percentile."""
    return quantiles([a / b for a, b in zip(baseline, samples, strict=True)])
