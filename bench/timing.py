"""Time: all backends of a case take turns, so that a change of the machine meets them alike.

On a GPU by events, with the L2 cache overwritten before each direction and nothing waited for between rounds; on a CPU
by the clock. A round gives one number per backend and direction, and one ratio to the baseline.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

MOST_ROUNDS, LEAST_ROUNDS = 100, 3


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
        self._flush: Tensor | None = None
        if self.cuda:
            cache = int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 2**26))
            self._flush = torch.empty(max(4 * cache, 2**28), dtype=torch.int8, device=device)

    def mark(self) -> float | torch.cuda.Event:
        """A point in time."""
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def cold(self) -> None:
        """Overwrite the L2 cache of a GPU; it also gives the host time to run ahead."""
        if self._flush is not None:
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


def _turn(runner: Runner, clock: Clock, grad: Tensor | None) -> list[float | torch.cuda.Event]:
    clock.cold()
    marks = [clock.mark()]
    output = runner.forward()
    marks.append(clock.mark())
    if runner.leaves:
        clock.cold()
        marks.append(clock.mark())
        runner.backward(output, grad)
        marks.append(clock.mark())
    return marks


def measure(runners: Sequence[Runner], device: torch.device, seconds: float) -> None:
    """Fill `samples` of every runner.

    Args:
        runners: contenders; each was called at least once before.
        device: where they run.
        seconds: time to spend on all of them together, as far as 3 to 100 rounds allow.
    """
    clock = Clock(device)
    grads = {runner.name: _output_gradient(runner) for runner in runners}
    start = time.perf_counter()
    for runner in runners:  # also the second warm-up
        _turn(runner, clock, grads[runner.name])
    clock.wait()
    spent = time.perf_counter() - start
    rounds = int(min(MOST_ROUNDS, max(LEAST_ROUNDS, seconds / max(spent, 1e-6))))
    turns: dict[str, list[list[float | torch.cuda.Event]]] = {runner.name: [] for runner in runners}
    for index in range(rounds):
        order = runners if index % 2 == 0 else runners[::-1]
        for runner in order:
            turns[runner.name].append(_turn(runner, clock, grads[runner.name]))
    clock.wait()
    for runner in runners:
        forward = [clock.between(marks[0], marks[1]) for marks in turns[runner.name]]
        runner.samples = {"forward": forward}
        if runner.leaves:
            backward = [clock.between(marks[2], marks[3]) for marks in turns[runner.name]]
            both = [a + b for a, b in zip(forward, backward, strict=True)]
            runner.samples |= {"backward": backward, "both": both}


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
