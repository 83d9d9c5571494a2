"""The two ceilings, measured on the machine at hand: copy bandwidth and matrix rate."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .formulas import Cost
from .timing import Clock

MEMORY, COMPUTE = "memory", "compute"


@dataclass(frozen=True)
class Roofline:
    """What this machine can do at best.

    Attributes:
        bandwidth: bytes a second of a large copy, reads and writes counted.
        matrix_rate: operations a second of a large matrix product, by dtype.
    """

    bandwidth: float
    matrix_rate: dict[str, float]

    def bound(self, cost: Cost, dtype: str) -> tuple[float, str]:
        """The least time in milliseconds for `cost`, and which ceiling sets it."""
        moving, computing = cost.bytes / self.bandwidth, cost.flops / self.matrix_rate[dtype]
        return 1e3 * max(moving, computing), MEMORY if moving >= computing else COMPUTE


def _best(call: Callable[[], object], clock: Clock, rounds: int) -> float:
    """The shortest time of one call, in seconds: a ceiling is what the machine reaches, not what it usually does."""
    call()
    marks = []
    for _ in range(rounds):
        start = clock.mark()
        call()
        marks.append((start, clock.mark()))
    clock.wait()
    return min(clock.between(*pair) for pair in marks) / 1e3


def measure(device: torch.device, dtypes: list[torch.dtype], fast: bool = False) -> Roofline:
    """Measure both ceilings; about a second a dtype.

    Args:
        device: where.
        dtypes: of the matrix products.
        fast: small sizes, whose numbers mean little.
    """
    clock = Clock(device)
    cuda = device.type == "cuda"
    size = 2**31 if cuda else 2**22 if fast else 2**28
    source = torch.ones(size, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * size / _best(functools.partial(target.copy_, source), clock, 10)
    del source, target
    side = 8192 if cuda else 128 if fast else 2048
    rates = {}
    for dtype in dtypes:
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        rates[str(dtype).removeprefix("torch.")] = 2 * side**3 / _best(functools.partial(torch.mm, a, b), clock, 10)
    return Roofline(bandwidth, rates)
