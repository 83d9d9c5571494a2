"""Kernel launches and host waits of one call, from the profiler's record of the CUDA driver."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

NO_DEVICE = "launches and waits are counted on CUDA devices only"
_REGION = "bench: the measured call"
_LAUNCHES = ("LaunchKernel", "GraphLaunch")
_WAITS = ("StreamSynchronize", "DeviceSynchronize", "EventSynchronize", "CtxSynchronize")


def count(call: Callable[[], Any], device: torch.device) -> tuple[int, int] | None:
    """Launches and waits of `call`; None on a device that has neither."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as record:
        with record_function(_REGION):
            call()
        torch.cuda.synchronize(device)
    events = record.events() or []
    region = next(event.time_range for event in events if event.name == _REGION)
    inside = [e.name for e in events if region.start <= e.time_range.start < region.end and e.name.startswith("cu")]
    launches = sum(any(text in name for text in _LAUNCHES) for name in inside)
    waits = sum(any(text in name for text in _WAITS) for name in inside)
    return launches, waits
