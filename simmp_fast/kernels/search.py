"""What there is to tune, and the way of one row through its configurations.

A row descends: every number of its best configuration is changed, one at a time (a tile also with its warps), and it
goes on from the fastest of these while that gains 2 %.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import import_module

from .configs import DTYPE_CLASSES, VERSION, Config, lookup, rows, widths

GAIN = 0.98
SMALLEST_TILE, LARGEST_TILE = 16, 256
WARPS, MOST_STAGES = (4, 8), 4


@dataclass(frozen=True)
class Target:
    """The device that is tuned for.

    Attributes:
        index: of the CUDA device.
        capability: its compute capability.
        limit: shared memory a block may have there, bytes.
    """

    index: int
    capability: tuple[int, int]
    limit: int


@dataclass(frozen=True)
class Subject:
    """A row of the table: kernel, dtype class and width."""

    kernel: str
    dtype: str
    width: int

    def __str__(self) -> str:
        return f"{self.kernel} {self.dtype} {self.width}"

    def row(self, target: Target) -> Config:
        """The configuration in use."""
        kind = "half" if self.dtype == "any" else self.dtype
        return lookup(self.kernel, kind, self.width, target.capability, target.limit)


def neighbours(config: Config) -> Iterator[Config]:
    """Configurations a step away: a tile halved or doubled, alone or with the warps that share it; other warps; a stage
    more or less; hoisting or not.
    """
    for name, size in config.tiles.items():
        if name == "HOIST":
            yield replace(config, tiles={**config.tiles, name: 1 - size})
        elif name != "GROUP":
            for value, warps in ((size // 2, config.warps // 2), (size * 2, config.warps * 2)):
                if SMALLEST_TILE <= value <= LARGEST_TILE:
                    smaller = replace(config, tiles={**config.tiles, name: value})
                    yield smaller
                    if warps in WARPS:
                        yield replace(smaller, warps=warps)
    for warps in WARPS:
        if warps != config.warps:
            yield replace(config, warps=warps)
    for stages in (config.stages - 1, config.stages + 1):
        if 1 <= stages <= MOST_STAGES:
            yield replace(config, stages=stages)


def key(config: Config) -> tuple[object, ...]:
    """What tells two configurations of a row apart."""
    return (tuple(sorted(config.tiles.items())), config.warps, config.stages)


class Descent:
    """The way of one row through its configurations, downhill in time.

    Args:
        start: the row in use.

    Attributes:
        best: the fastest configuration so far.
        time: its milliseconds; infinite before anything was timed.
        first: those of `start`.
        done: whether nothing was gained last, or nothing can be.
    """

    def __init__(self, start: Config) -> None:
        self.start = self.best = start
        self.first = self.time = self._before = math.inf
        self.done = False
        self._tried = {key(start)}

    def candidates(self) -> list[Config]:
        """Neighbours of the best configuration that were not tried yet."""
        found = {key(config): config for config in neighbours(self.best) if key(config) not in self._tried}
        self._tried |= found.keys()
        return list(found.values())

    def begin(self, time: float) -> None:
        """A round begins: the best configuration once more, in the same minute as its rivals."""
        self.first = time if self.first == math.inf else self.first
        self.time = self._before = time

    def take(self, config: Config, time: float) -> bool:
        """Go to a candidate if it is the fastest so far and gains enough on where the round began; whether it is."""
        if time >= min(self.time, GAIN * self._before):
            return False
        self.best, self.time = config, time
        return True


def row_text(config: Config, capability: tuple[int, int], note: str, version: str = VERSION) -> str:
    """A configuration as a row of `measured.txt`."""
    tiles = ",".join(f"{name}={size}" for name, size in config.tiles.items()) or "-"
    shared = -(-config.shared // 1024)
    return (
        f"{config.kernel} {config.dtype} {config.width} {capability[0]}.{capability[1]}@{version} {tiles} "
        f"{config.warps} {config.stages} {shared} {config.stack} measured # {note}"
    )


def _known(what: str, given: Sequence[str], there: Sequence[str]) -> None:
    unknown = [name for name in given if name not in there]
    if unknown:
        raise ValueError(f"{what}: got {unknown[0]!r}, expected some of {', '.join(there)}")


def plan(kernels: Sequence[str], dtypes: Sequence[str], first: Sequence[str] = ()) -> Iterator[Subject]:
    """Every row to tune, the most important ones first.

    Args:
        kernels: names in the table, in the order in which they are tuned; none for all.
        dtypes: dtype classes.
        first: rows that come before all others, by kernel or by ``kernel:width``, in this order.

    Raises:
        ValueError: a kernel or dtype class that the table does not have.
    """
    import_module("simmp_fast.kernels")
    known = list(dict.fromkeys(row.kernel for row in rows()))
    _known("kernel", kernels, known)
    _known("--dtype", dtypes, DTYPE_CLASSES)
    _known("--first", first, [*known, *dict.fromkeys(f"{row.kernel}:{row.width}" for row in rows())])
    subjects = [
        Subject(kernel, dtype, width)
        for kernel in kernels or known
        for dtype in dict.fromkeys(row.dtype for row in rows(kernel))
        if dtype in dtypes or dtype == "any"
        for width in widths(kernel, dtype)
    ]
    names = list(first)

    def importance(subject: Subject) -> int:
        places = [names.index(n) for n in (subject.kernel, f"{subject.kernel}:{subject.width}") if n in names]
        return min(places, default=len(names))

    yield from sorted(subjects, key=importance)
