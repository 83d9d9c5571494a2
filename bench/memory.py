"""Peak memory, the bound on it, and what running out of it looks like.

Peak: bytes of tensors alive at once, above those alive before the call. On CUDA from the allocator's own record, on a
CPU from the allocations that the profiler sees; so both mean the same, and neither counts scratch space of libraries.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

# Share of the memory that is free at the start which a run may take on a CPU.
SHARE = 0.9


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int | None:
    """Most bytes that `call` holds at once on `device`, above what was held before; its result counts, and is dropped.

    None where the profiler of this PyTorch gives no account of a CPU's allocations.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    events = _allocations(record)
    if not events:
        return None
    held = peak = 0
    for _, size in sorted(events, key=lambda event: event[0]):
        held += size
        peak = max(peak, held)
    return peak


def _allocations(record: Any) -> list[tuple[int, int]]:
    """(time, bytes) of every allocation and release on the CPU; empty where this PyTorch does not say."""
    results = getattr(getattr(record, "profiler", None), "kineto_results", None)
    events = [] if results is None else results.events()
    return [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]


def available_bytes() -> int | None:
    """Memory that can still be taken on this machine, within the limit of a container; None where nobody says."""
    found = []
    try:
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text(encoding="utf-8").strip()
        if limit != "max":
            found.append(int(limit) - int((group / "memory.current").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        pass
    return min(found) if found else None


@contextlib.contextmanager
def bounded(device: torch.device) -> Iterator[None]:
    """On a CPU, let an allocation beyond the free memory fail, rather than have the system kill the process."""
    free = available_bytes() if device.type == "cpu" else None
    try:
        import resource
    except ImportError:  # no such limit on this system
        free = None
    if free is None:
        yield
        return
    taken = _data_bytes()
    before = resource.getrlimit(resource.RLIMIT_DATA)
    bound = taken + int(SHARE * free)
    if before[1] != resource.RLIM_INFINITY:
        bound = min(bound, before[1])
    resource.setrlimit(resource.RLIMIT_DATA, (bound, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def _data_bytes() -> int:
    """What counts against the limit already."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmData:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return 0


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on the device or on the host."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(
        text in str(error).lower() for text in ("out of memory", "can't allocate memory", "not enough memory")
    )
