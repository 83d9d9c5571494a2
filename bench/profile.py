"""Where a training step's time goes, kernel by kernel: ``python -m bench.profile --backend triton-fast --out DIR``.

Writes `profile.md` (the thirty kernels that take most, and the ten longest stretches in which the device had nothing to
do, between which kernels) and `profile.json` with all kernels and a hundred such stretches. A CPU has no kernels:
PyTorch's operators stand for them there, each with the time that is its own.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from simmp_fast.cli.common import choose_device
from simmp_fast.config import ConfigError

from . import environment, network
from .backends import BACKENDS, Backend, one
from .cases import CPU_BATCH, GPU_BATCH, STEP
from .measure import dtype_name
from .rows import write

SHOWN_KERNELS, SHOWN_GAPS, MOST_GAPS = 30, 10, 100
LONGEST_NAME = 90
# What of a trace ran on a GPU, by its category.
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")


@dataclass(frozen=True)
class Interval:
    """A stretch in which something ran on the device, in microseconds of the profiler's clock.

    Attributes:
        calls: 1 where the call began with it, 0 where it goes on after a call of its own.
        blocks: of a kernel's grid; 0 where that is not known.
    """

    name: str
    start: float
    end: float
    calls: int = 1
    blocks: int = 0


@dataclass(frozen=True)
class Kernel:
    """All calls of one kernel with one size of grid.

    Attributes:
        calls: a step.
        ms: a step.
        share: of the time in which the device was at work; kernels that overlap count twice.
        blocks: of its grid; 0 where that is not known.
    """

    name: str
    calls: float
    ms: float
    share: float
    blocks: int = 0


@dataclass(frozen=True)
class Gap:
    """A stretch without work, microseconds, and the kernels on either side."""

    us: float
    after: str
    before: str


@dataclass(frozen=True)
class Profile:
    """What the steps of a record were made of.

    Attributes:
        steps: how many were recorded.
        span_ms: from the first kernel's start to the last one's end, a step.
        busy_ms: of that, time in which at least one kernel ran.
        kernels: the most expensive first.
        gaps: the hundred longest of all steps, the longest first.
    """

    steps: int
    span_ms: float
    busy_ms: float
    kernels: list[Kernel]
    gaps: list[Gap]


def summarise(intervals: Sequence[Interval], steps: int) -> Profile:
    """Kernels and gaps of what ran in `steps` steps.

    Raises:
        ValueError: nothing ran.
    """
    if not intervals:
        raise ValueError("intervals: got none, expected what ran on the device")
    ordered = sorted(intervals, key=lambda interval: (interval.start, interval.end))
    gaps, last, busy = [], ordered[0], 0.0
    covered = ordered[0].start
    for current in ordered:
        if current.start > covered:
            gaps.append(Gap(current.start - covered, last.name, current.name))
        if current.end > covered:
            busy += current.end - max(covered, current.start)
            covered, last = current.end, current
    alike: dict[tuple[str, int], list[Interval]] = {}
    for interval in ordered:
        alike.setdefault((interval.name, interval.blocks), []).append(interval)
    kernels = []
    for (name, blocks), mine in alike.items():
        time = sum(interval.end - interval.start for interval in mine)
        calls = sum(interval.calls for interval in mine)
        kernels.append(Kernel(name, calls / steps, time / 1e3 / steps, time / busy if busy else 0.0, blocks))
    return Profile(
        steps,
        (covered - ordered[0].start) / 1e3 / steps,
        busy / 1e3 / steps,
        sorted(kernels, key=lambda kernel: -kernel.ms),
        sorted(gaps, key=lambda gap: -gap.us)[:MOST_GAPS],
    )


def intervals_of(record: Any, device: torch.device) -> list[Interval]:
    """What ran on the device while the profiler listened: kernels and copies, or a CPU's operators."""
    if device.type == "cuda":
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            record.export_chrome_trace(str(path))  # the only record that has the grids
            return traced(json.loads(path.read_text(encoding="utf-8")))
    events = [event for event in record.events() if not event.is_user_annotation]
    return [piece for event in events if not event.name.startswith("[") for piece in _own(event)]


def traced(trace: dict[str, Any]) -> list[Interval]:
    """Kernels, copies and fillings of a trace in Chrome's format."""
    found = []
    for event in trace["traceEvents"]:
        if event.get("ph") == "X" and event.get("cat") in ON_DEVICE:
            start = float(event["ts"])
            blocks = math.prod(event.get("args", {}).get("grid", [0]))
            found.append(Interval(event["name"], start, start + float(event["dur"]), blocks=blocks))
    return found


def _own(event: Any) -> list[Interval]:
    """The stretches of a CPU operator in which none that it called was at work."""
    children = sorted((child.time_range for child in event.cpu_children), key=lambda time: time.start)
    starts = [event.time_range.start, *(child.end for child in children)]
    ends = [*(child.start for child in children), event.time_range.end]
    pieces = [(start, end) for start, end in zip(starts, ends, strict=True) if end > start]
    return [Interval(event.name, start, end, calls=int(index == 0)) for index, (start, end) in enumerate(pieces)]


def record(backend: Backend, sizes: dict[str, int], dtype: torch.dtype, device: torch.device, count: int) -> Profile:
    """Profile `count` training steps of the network after as many as a capture needs."""
    steps = network.make(sizes, dtype, device).steps()
    steps.take(backend)
    steps.reach_replay(backend)
    steps.take(backend)
    return listen(lambda: steps.take(backend), device, count)


def listen(take: Callable[[], object], device: torch.device, count: int) -> Profile:
    """Profile `count` calls."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        activities = [ProfilerActivity.CUDA]
    with profile(activities=activities) as listening:
        for _ in range(count):
            take()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return summarise(intervals_of(listening, device), count)


def markdown(found: Profile, title: str, where: dict[str, Any]) -> str:
    """The thirty largest kernels and ten longest gaps as tables."""
    idle = found.span_ms - found.busy_ms
    machine = where["gpu"] or where["cpu"]
    lines = [
        f"# {title}",
        "",
        f"{machine}, torch {where['torch']}, triton {where['triton']}, commit {where['commit']}; {found.steps} steps.",
        "",
        f"A step spans {found.span_ms:.2f} ms; at work {found.busy_ms:.2f} ms, idle {idle:.2f} ms "
        f"({100 * idle / found.span_ms if found.span_ms else 0:.0f} %), in "
        f"{sum(kernel.calls for kernel in found.kernels):.0f} kernels and copies.",
        "",
        "| kernel | blocks | calls a step | ms a step | share |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| `{_short(kernel.name)}` | {kernel.blocks or ''} | {kernel.calls:g} | {kernel.ms:.3f} | "
        f"{100 * kernel.share:.1f} % |"
        for kernel in found.kernels[:SHOWN_KERNELS]
    ]
    lines += ["", "| gap, us | after | before |", "|---|---|---|"]
    lines += [f"| {gap.us:.1f} | `{_short(gap.after)}` | `{_short(gap.before)}` |" for gap in found.gaps[:SHOWN_GAPS]]
    return "\n".join(lines) + "\n"


def save(found: Profile, title: str, where: dict[str, Any], folder: Path, name: str = "profile") -> str:
    """Write `name`.md and `name`.json; returns the text of the first."""
    text = markdown(found, title, where)
    write(folder / f"{name}.md", text)
    write(folder / f"{name}.json", json.dumps({"title": title, "environment": where, **asdict(found)}, indent=1))
    return text


def title_of(backend: Backend, dtype: torch.dtype, batch: int) -> str:
    """What a profile is of."""
    return f"Training step, {backend.name}, {dtype_name(dtype)}, batch {batch}"


def _short(name: str) -> str:
    """A name that fits a table and does not break it."""
    name = name.replace("|", "/").replace("`", "'")
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 3] + "..."


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns 2 for a wrong argument."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.profile", description="profile the training step of the synapse preset, kernel by kernel"
    )
    parser.add_argument("--backend", default=None, help=f"one of {', '.join(BACKENDS)} (default: the fastest here)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default=None, help="(default: bfloat16 on a GPU)")
    parser.add_argument("--batch", type=int, default=None, help=f"images (default: {GPU_BATCH} on a GPU, {CPU_BATCH})")
    parser.add_argument("--side", type=int, default=256, help="of the images (default: 256; below, the small network)")
    parser.add_argument("--steps", type=int, default=3, help="steps to profile (default: 3)")
    parser.add_argument("--device", default=None, help="such as cpu or cuda:0 (default: a GPU if there is one)")
    parser.add_argument("--out", type=Path, default=Path("bench-results"), help="folder (default: bench-results)")
    options = parser.parse_args(arguments)
    try:
        if options.steps < 1:
            raise ConfigError(f"--steps: got {options.steps}, expected at least 1")
        device = choose_device(options.device)
        on_gpu = device.type == "cuda"
        backend = one(options.backend or ("triton-fast" if on_gpu else "portable"), device, STEP)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    sizes = {"B": options.batch or (GPU_BATCH if on_gpu else CPU_BATCH), "side": options.side}
    dtype = getattr(torch, options.dtype or ("bfloat16" if on_gpu else "float32"))
    found = record(backend, sizes, dtype, device, options.steps)
    print(save(found, title_of(backend, dtype, sizes["B"]), environment.describe(device), options.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
