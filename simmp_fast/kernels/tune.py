"""Measure configurations of the kernels on the GPU at hand and keep the fastest.

    python -m simmp_fast.kernels.tune                        # every kernel, bfloat16 and float32
    python -m simmp_fast.kernels.tune context_forward        # some kernels
    python -m simmp_fast.kernels.tune --dtype half           # one dtype class
    python -m simmp_fast.kernels.tune --dry-run              # what there is to tune, without a GPU

From the row in use one number is changed at a time and a change is kept if it gains 2 %, until none does. What spills,
needs more shared memory than the device has, or leads to other results is never timed. Rows go to `measured.txt` as
they are found; bring docs/kernels/resources.txt up to date afterwards.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import torch
import triton
from torch import Tensor

from .aot import Case, compile_case, faults
from .configs import DTYPE_CLASSES, MEASURED, Config, device_limits, forced, lookup, rows, widths
from .workloads import workload

GAIN = 0.98
SMALLEST_TILE, LARGEST_TILE = 16, 256
WARPS, MOST_STAGES = (4, 8), 4
# The dtype that stands for a class, by PyTorch and by the names of `aot`.
STANDS_FOR = {
    "half": (torch.bfloat16, "bfloat16"),
    "float32": (torch.float32, "float32"),
    "tf32": (torch.float32, "tf32"),
    "any": (torch.bfloat16, "bfloat16"),
}


def neighbours(config: Config) -> Iterator[Config]:
    """Configurations that differ in one number: a tile halved or doubled, other warps, a stage more or less."""
    for name, size in config.tiles.items():
        if name in ("HOIST", "GROUP"):
            values = [1 - size] if name == "HOIST" else []
        else:
            values = [value for value in (size // 2, size * 2) if SMALLEST_TILE <= value <= LARGEST_TILE]
        for value in values:
            yield replace(config, tiles={**config.tiles, name: value})
    for warps in WARPS:
        if warps != config.warps:
            yield replace(config, warps=warps)
    for stages in (config.stages - 1, config.stages + 1):
        if 1 <= stages <= MOST_STAGES:
            yield replace(config, stages=stages)


def search(start: Config, measure: Callable[[Config], float | None]) -> tuple[Config, float, float]:
    """Follow the neighbours that gain until none does.

    Args:
        start: the row in use.
        measure: milliseconds of a configuration, None where it cannot be used.

    Returns:
        the fastest configuration found, its time, and that of `start`.

    Raises:
        ValueError: `start` itself cannot be used.
    """
    first = measure(start)
    if first is None:
        raise ValueError(f"{start.kernel}: the configuration in use cannot run")
    best, time, tried = start, first, {_key(start)}
    improved = True
    while improved:
        improved = False
        for candidate in neighbours(best):
            if _key(candidate) in tried:
                continue
            tried.add(_key(candidate))
            found = measure(candidate)
            if found is not None and found < GAIN * time:
                best, time, improved = candidate, found, True
                break
    return best, time, first


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


class Device:
    """Times the configurations of one kernel on one GPU."""

    def __init__(self, start: Config, dtype: str, device: torch.device, capability: tuple[int, int]) -> None:
        self.start, self.name, self.capability = start, STANDS_FOR[dtype][1], capability
        self.run = workload(start.kernel, start.width, STANDS_FOR[dtype][0], device)
        with forced(start):
            self.known = [x.clone() for x in self.run()]

    def measured(self, config: Config) -> Config | None:
        """The configuration with the shared memory that it needs here; None where it breaks a rule."""
        limit = device_limits(torch.cuda.current_device())[1]
        case = Case(config.kernel, self.name, replace(config, shared=limit), self.capability)
        try:
            found = compile_case(case)
        except Exception as error:  # whatever the compiler refuses is no candidate
            print(f"  {_key(config)}: does not compile ({type(error).__name__})", file=sys.stderr)
            return None
        if faults(case, found):
            return None
        return replace(config, shared=max(found.shared, 1024), stack=found.stack)

    def __call__(self, config: Config) -> float | None:
        """Milliseconds of the workload with this configuration; None where it cannot be used."""
        if config is not self.start and self.measured(config) is None:
            return None
        with forced(config):
            if not _agree(self.run(), self.known):
                print(f"  {_key(config)}: other results", file=sys.stderr)
                return None
            return float(triton.testing.do_bench(self.run, warmup=10, rep=60, return_mode="median"))


def plan(kernels: Sequence[str], dtypes: Sequence[str]) -> Iterator[tuple[str, str, int]]:
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
                    yield kernel, dtype, width


def tune(wanted: Sequence[tuple[str, str, int]]) -> None:
    """Tune what `plan` names on the current CUDA device and keep what is faster."""
    index = torch.cuda.current_device()
    capability, limit = device_limits(index)
    where = f"{torch.cuda.get_device_name(index)}, torch {torch.__version__}, triton {triton.__version__}"
    for kernel, dtype, width in wanted:
        torch.backends.cuda.matmul.fp32_precision = "tf32" if dtype == "tf32" else "ieee"
        start = lookup(kernel, "half" if dtype == "any" else dtype, width, capability, limit)
        timer = Device(start, dtype, torch.device("cuda", index), capability)
        best, time, first = search(start, timer)
        print(f"{kernel} {dtype} {width}: {first:.3f} ms -> {time:.3f} ms {_key(best)}", flush=True)
        final = timer.measured(best) if best is not start else None
        if final is not None:
            keep(row_text(replace(final, dtype=start.dtype), capability, f"{first / time:.2f}x, {where}"))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns 1 where there is nothing to measure on, 2 for a wrong argument."""
    parser = argparse.ArgumentParser(prog="python -m simmp_fast.kernels.tune", description=__doc__.split("\n")[0])
    parser.add_argument("kernels", nargs="*", help="names in the table (default: all)")
    parser.add_argument("--dtype", nargs="*", default=["half", "float32"], help="half, float32, tf32")
    parser.add_argument("--dry-run", action="store_true", help="list what would be tuned")
    options = parser.parse_args(arguments)
    try:
        wanted = list(plan(options.kernels, options.dtype))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if options.dry_run:
        print("\n".join(f"{kernel} {dtype} {width}" for kernel, dtype, width in wanted))
        return 0
    if not torch.cuda.is_available():
        print("tune: no CUDA device is present; --dry-run lists what there is to tune", file=sys.stderr)
        return 1
    tune(wanted)
    print(f"rows are in {MEASURED}; now run: python -m simmp_fast.kernels.compile")
    return 0


if __name__ == "__main__":
    sys.exit(main())
