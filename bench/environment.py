"""The machine and the versions a result belongs to; no host name and no path of the machine."""

from __future__ import annotations

import importlib.util
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import simmp_fast

from . import nullgpu

ROOT = Path(__file__).resolve().parent.parent


def git(*arguments: str) -> str | None:
    """The answer of git about this clone; None where there is none."""
    try:
        command = ["git", "-C", str(ROOT), *arguments]
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def cpu_model() -> str:
    """The processor's name as it gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _commit() -> str:
    told = os.environ.get("SIMMP_FAST_COMMIT")
    if told:  # a copy of the files, whose maker knows what they are; a history beside it may be another one
        return told
    commit = git("rev-parse", "--short=12", "HEAD") if (ROOT / ".git").exists() else None
    if commit is None:
        return "unknown"
    changed = git("status", "--porcelain", "--", "simmp_fast", "bench")
    return f"{commit} with changes" if changed else commit


def _driver() -> str | None:
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = result.stdout.split()
    return lines[0] if result.returncode == 0 and lines else None


def describe(device: torch.device) -> dict[str, Any]:
    """Everything a reader needs to place a number."""
    found: dict[str, Any] = {
        "device": device.type,
        "cpu": cpu_model(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "gpu": None,
        "capability": None,
        "driver": None,
        "cuda": None,
        "l2_mib": None,
        "torch": torch.__version__,
        "triton": None,
        "python": platform.python_version(),
        "system": platform.system(),
        "simmp_fast": simmp_fast.__version__,
        "commit": _commit(),
        "float32_matmul": torch.get_float32_matmul_precision(),
    }
    if importlib.util.find_spec("triton") is not None:
        import triton

        found["triton"] = triton.__version__
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        name = torch.cuda.get_device_name(device)
        if nullgpu.present() and nullgpu.NAME not in name:  # no figure of it may pass for one of the GPU it plays
            name = f"{nullgpu.NAME} by the name of {name}"
        found |= {"gpu": name, "capability": f"{major}.{minor}"}
        found |= {"driver": _driver(), "cuda": torch.version.cuda}
        found["l2_mib"] = torch.cuda.get_device_properties(device).L2_cache_size / 2**20
    return found
