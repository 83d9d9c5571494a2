"""Measure configurations of the kernels on the GPU at hand and keep the fastest.

    python -m simmp_fast.kernels.tune                        # every kernel, bfloat16 and float32
    python -m simmp_fast.kernels.tune context_forward        # some kernels
    python -m simmp_fast.kernels.tune --dtype half           # one dtype class
    python -m simmp_fast.kernels.tune --minutes 9            # stop then; what was found is kept
    python -m simmp_fast.kernels.tune --dry-run              # what there is to tune, without a GPU

All rows descend together, round by round. In a round every number of a row's best configuration is changed, one at a
time (a tile also with its warps); all these candidates are compiled, each by a process of its own, which leaves the
machine code in Triton's cache; then this process, alone on the GPU, times them. A row goes on from its fastest
candidate while that gains 2 %. What spills, needs more shared memory than the device has, or leads to other results is
never timed. Rows go to `measured.txt` as they are found; bring docs/kernels/resources.txt up to date afterwards.
"""

from __future__ import annotations

import argparse
import functools
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from .aot import Case, faults, resources_of
from .configs import DTYPE_CLASSES, MEASURED, Config, device_limits, forced, lookup, rows, widths
from .launch import watched
from .workloads import Run, workload

GAIN = 0.98
SMALLEST_TILE, LARGEST_TILE = 16, 256
WARPS, MOST_STAGES = (4, 8), 4
# Processes that compile at the same time, each with a workload of its own; and the seconds that one may take.
MOST_JOBS, PATIENCE = 14, 180.0
# The dtype that stands for a class, by PyTorch and by the names of `aot`.
STANDS_FOR = {
    "half": (torch.bfloat16, "bfloat16"),
    "float32": (torch.float32, "float32"),
    "tf32": (torch.float32, "tf32"),
    "any": (torch.bfloat16, "bfloat16"),
}


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


class Descent:
    """The way of one row through its configurations, downhill in time.

    Args:
        start: the row in use.
        first: its milliseconds.

    Attributes:
        best: the fastest configuration so far.
        time: its milliseconds.
        done: whether nothing was gained last.
    """

    def __init__(self, start: Config, first: float) -> None:
        self.start = self.best = start
        self.first = self.time = first
        self.done = False
        self._tried = {_key(start)}

    def candidates(self) -> list[Config]:
        """Neighbours of the best configuration that were not tried yet."""
        found = {_key(config): config for config in neighbours(self.best) if _key(config) not in self._tried}
        self._tried |= found.keys()
        return list(found.values())

    def take(self, times: Sequence[tuple[Config, float]]) -> bool:
        """Go to the fastest of the candidates that could be timed, if it gains; whether it did."""
        best, least = min(times, key=lambda found: found[1], default=(self.best, math.inf))
        self.done = least >= GAIN * self.time
        if not self.done:
            self.best, self.time = best, least
        return not self.done


def _key(config: Config) -> tuple[object, ...]:
    return (tuple(sorted(config.tiles.items())), config.warps, config.stages)


def row_text(config: Config, capability: tuple[int, int], note: str) -> str:
    """A configuration as a row of `measured.txt`."""
    tiles = ",".join(f"{name}={size}" for name, size in config.tiles.items()) or "-"
    shared = -(-config.shared // 1024)
    return (
        f"{config.kernel} {config.dtype} {config.width} {capability[0]}.{capability[1]} {tiles} {config.warps} "
        f"{config.stages} {shared} {config.stack} measured # {note}"
    )


def keep(text: str, path: Path = MEASURED) -> None:
    """Write a row to the file of measured rows in place of an older one of the same kernel, dtype, width and device."""
    same = text.split()[:4]
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.split()[:4] != same]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("\n".join([*lines, text]) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _agree(found: Sequence[Tensor], known: Sequence[Tensor]) -> bool:
    """Whether two results differ by rounding alone."""
    for mine, yours in zip(found, known, strict=True):
        if not mine.is_floating_point():
            if not torch.equal(mine, yours):
                return False
            continue
        rounding = 8 * torch.finfo(mine.dtype).eps
        difference, size = (mine.double() - yours.double()).norm(), yours.double().norm()
        if not bool(difference <= rounding * size + 1e-12):
            return False
    return True


def judged(config: Config, dtype: str, compiled: Any, target: Target) -> Config | str:
    """The configuration with what its compiled kernel needs; in words why it cannot be used, if it cannot."""
    case = Case(config.kernel, STANDS_FOR[dtype][1], replace(config, shared=target.limit), target.capability)
    found = resources_of(compiled, target.capability)
    wrong = faults(case, found)
    return wrong[0] if wrong else replace(config, shared=max(found.shared, 1024), stack=found.stack)


@functools.lru_cache(maxsize=1)
def _workload(subject: Subject, index: int) -> Run:
    torch.backends.cuda.matmul.fp32_precision = "tf32" if subject.dtype == "tf32" else "ieee"
    return workload(subject.kernel, subject.width, STANDS_FOR[subject.dtype][0], torch.device("cuda", index))


def compiled(subject: Subject, config: Config, target: Target) -> Config | str:
    """`judged`, by a launch of the workload, which leaves the machine code in Triton's cache."""
    with torch.cuda.device(target.index), forced(config), watched() as seen:
        _workload(subject, target.index)()
        torch.cuda.synchronize()
    return judged(config, subject.dtype, seen[config.kernel], target)


# Forked from a process that has imported everything and never touches the GPU.
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["simmp_fast.kernels.workloads", "simmp_fast.kernels.aot"])


def isolated(function: Callable[..., Any], *arguments: Any, seconds: float = PATIENCE) -> Any:
    """Call a function in a process of its own: compilers abort, and a kernel that fails takes its context along.

    Returns:
        its result; in words what became of it where it raised, took too long, or ended its process.
    """
    receiver, sender = _PROCESSES.Pipe(duplex=False)
    process = _PROCESSES.Process(target=_answer, args=(sender, function, arguments), daemon=True)
    process.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(seconds) else f"takes more than {seconds:g} seconds"
    except EOFError:
        process.join()
        return f"ends its process (exit status {process.exitcode})"
    finally:
        process.kill()
        process.join()


def compiled_apart(subject: Subject, config: Config, target: Target) -> Config | str:
    """`compiled` in a process of its own."""
    found: Config | str = isolated(compiled, subject, config, target)
    return found


def _answer(sender: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        sender.send(function(*arguments))
    except Exception as error:
        sender.send(f"does not run ({type(error).__name__})")


def timed(subject: Subject, configs: Sequence[Config], start: Config, target: Target) -> list[tuple[Config, float]]:
    """Milliseconds of the configurations whose results are those of `start`, which itself is first among them."""
    run = _workload(subject, target.index)
    with forced(start):
        known = [x.clone() for x in run()]
    found = []
    for config in (start, *configs):
        with forced(config):
            if not _agree(run(), known):
                print(f"  {subject} {_key(config)}: other results", file=sys.stderr)
                continue
            found.append((config, float(triton.testing.do_bench(run, warmup=10, rep=40, return_mode="median"))))
    return found


def plan(kernels: Sequence[str], dtypes: Sequence[str]) -> Iterator[Subject]:
    """Kernel, dtype class and width of every row to tune.

    Raises:
        ValueError: a kernel or dtype class that the table does not have.
    """
    import_module("simmp_fast.kernels")
    known = list(dict.fromkeys(row.kernel for row in rows()))
    for what, given, there in (("kernel", kernels, known), ("--dtype", dtypes, DTYPE_CLASSES)):
        unknown = [name for name in given if name not in there]
        if unknown:
            raise ValueError(f"{what}: got {unknown[0]!r}, expected some of {', '.join(there)}")
    for kernel in kernels or known:
        for dtype in dict.fromkeys(row.dtype for row in rows(kernel)):
            if dtype in dtypes or dtype == "any":
                for width in widths(kernel, dtype):
                    yield Subject(kernel, dtype, width)


def tune(
    subjects: Sequence[Subject],
    target: Target,
    *,
    jobs: int = 1,
    seconds: float = math.inf,
    compile: Callable[[Subject, Config, Target], Config | str] = compiled_apart,
    time_them: Callable[[Subject, Sequence[Config], Config, Target], list[tuple[Config, float]]] = timed,
    note: str = "",
    path: Path = MEASURED,
) -> dict[Subject, Descent]:
    """Descend from the rows in use and keep what is faster.

    Args:
        subjects: of `plan`.
        target: the device.
        jobs: candidates that are compiled at the same time.
        seconds: no round begins after them.
        compile, time_them: what is done with candidates.
        note: device and versions, for the rows that are written.
        path: file of the measured rows.

    Returns:
        where each row ended; one that could not run at all is missing, and named on the standard error.
    """
    end = time.monotonic() + seconds
    descents: dict[Subject, Descent] = {}
    for subject in subjects:
        start = lookup(
            subject.kernel, "half" if subject.dtype == "any" else subject.dtype, subject.width, target.capability,
            target.limit,
        )  # fmt: skip
        try:
            descents[subject] = Descent(start, time_them(subject, [], start, target)[0][1])
        except Exception as error:
            print(f"{subject}: the row in use cannot run ({type(error).__name__}: {error})", file=sys.stderr)
    while time.monotonic() < end:
        active = {subject: descent for subject, descent in descents.items() if not descent.done}
        if not active:
            break
        waiting = [(subject, config) for subject, descent in active.items() for config in descent.candidates()]
        usable: dict[Subject, list[Config]] = {subject: [] for subject in active}
        with ThreadPoolExecutor(jobs) as pool:
            answers = pool.map(lambda candidate: compile(candidate[0], candidate[1], target), waiting)
        for (subject, config), found in zip(waiting, answers, strict=True):
            if isinstance(found, Config):
                usable[subject].append(found)
            else:
                print(f"  {subject} {_key(config)}: {found}", file=sys.stderr)
        for subject, descent in active.items():
            times = time_them(subject, usable[subject], descent.best, target)
            # The best one once more, in the same minute as its rivals.
            descent.time = times[0][1]
            if descent.take(times[1:]):
                gain = f"{descent.first / descent.time:.2f}x"
                row = replace(descent.best, dtype=descent.start.dtype)
                keep(row_text(row, target.capability, f"{gain}{note and ', '}{note}"), path)
                print(f"{subject}: {descent.first:.3f} -> {descent.time:.3f} ms, {gain} {_key(row)}", flush=True)
    return descents


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns 1 where there is nothing to measure on, 2 for a wrong argument."""
    parser = argparse.ArgumentParser(prog="python -m simmp_fast.kernels.tune", description=__doc__.split("\n")[0])
    parser.add_argument("kernels", nargs="*", help="names in the table (default: all)")
    parser.add_argument("--dtype", nargs="*", default=["half", "float32"], help="half, float32, tf32")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no round after them (default: no limit)")
    parser.add_argument("--dry-run", action="store_true", help="list what would be tuned")
    options = parser.parse_args(arguments)
    try:
        wanted = list(plan(options.kernels, options.dtype))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if options.dry_run:
        print("\n".join(map(str, wanted)))
        return 0
    if not torch.cuda.is_available():
        print("tune: no CUDA device is present; --dry-run lists what there is to tune", file=sys.stderr)
        return 1
    index = torch.cuda.current_device()
    target = Target(index, *device_limits(index))
    note = f"{torch.cuda.get_device_name(index)}, torch {torch.__version__}, triton {triton.__version__}"
    jobs = max(1, min(MOST_JOBS, len(os.sched_getaffinity(0)) - 1))
    tune(wanted, target, jobs=jobs, seconds=60 * options.minutes, note=note)
    print(f"rows are in {MEASURED}; now run: python -m simmp_fast.kernels.compile")
    return 0


if __name__ == "__main__":
    sys.exit(main())
