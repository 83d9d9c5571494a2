"""A GPU that computes nothing, to run every line of GPU code on a machine without one.

    python -m bench.nullgpu python -m bench.form --backend triton-graph --out /tmp/rows
    python -m bench.nullgpu --capability 8.6 python -m pytest tests/gpu -m gpu
    python -m bench.nullgpu --plays "NVIDIA H200" python -m bench.form --backend triton-fast --out /tmp/rows

PyTorch finds a CUDA device: host memory stands for its memory and is accounted, graphs are captured, a wait during a
capture is an error, and Triton compiles for the capability and launches to its last call. Kernels do nothing, so
results are whatever lies in memory and times mean nothing: there is no cuDNN, tests do not judge results
(`bench.nullgpu.unjudged`), and the device is called "null GPU". Where it plays a GPU it has that one's name, and cuDNN
as far as shapes and layouts go: what `torch.compile` makes then is what it would make there (docs/lease.md).

Needs a C compiler, and PyTorch and Triton with CUDA, whose packages carry the headers.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).resolve().parent
NAME = "null GPU"
SOURCES = {
    "libnullgpu.so": ("runtime.c", "nothing.c"),
    "libnvrtc.so.13": ("nvrtc.c",),
    "libcuda.so.1": ("driver.c",),
}
# Arguments that a function ignores, and types that it need not know, are the point here.
FLAGS = ("-w", "-O1", "-shared", "-fPIC")
# Programs ask for symbols of this library by a version, which is its name.
VERSIONED = "libnvrtc.so.13"
PRELOADED = ("libnullgpu.so", "libnvrtc.so.13")
# Multiprocessors of a GPU of each capability; others count as one of 9.0.
PROCESSORS = {(8, 0): 108, (8, 6): 84, (8, 9): 128, (9, 0): 132, (10, 0): 148, (12, 0): 170}


class NullGPUError(RuntimeError):
    """The null GPU cannot be built or used here: says why."""


def include_folders() -> list[Path]:
    """Folders of CUDA headers in the installed packages: those of PyTorch's runtime, and Triton's for the rest.

    Raises:
        NullGPUError: PyTorch or Triton is there without CUDA.
    """
    packages = Path(sysconfig.get_path("purelib"))
    triton = importlib.util.find_spec("triton")
    found = sorted(packages.glob("nvidia/*/include")) if (packages / "nvidia").is_dir() else []
    found = [folder for folder in found if (folder / "cuda_runtime_api.h").is_file()]
    if triton is not None and triton.origin is not None:
        found.append(Path(triton.origin).parent / "backends" / "nvidia" / "include")
    if len(found) < 2:
        raise NullGPUError("null GPU: found no CUDA headers; it needs PyTorch and Triton as built for CUDA")
    return found


def build() -> Path:
    """The folder of the libraries, compiled where they are missing or older than their source.

    Raises:
        NullGPUError: there is no C compiler, or the sources do not compile against the headers.
    """
    headers = include_folders()
    text = b"".join((HERE / name).read_bytes() for names in SOURCES.values() for name in names)
    known = hashlib.sha256(text + repr((headers, FLAGS, VERSIONED)).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "simmp_fast" / f"nullgpu-{known}"
    compiler = os.environ.get("CC", "cc")
    for library, names in SOURCES.items():
        if (folder / library).exists():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        made = folder / f".{os.getpid()}-{library}"
        command = [compiler, *FLAGS, *(f"-I{path}" for path in headers), f"-Wl,-soname,{library}", "-o", str(made)]
        command += [*(str(HERE / name) for name in names), "-ldl", "-lpthread"]
        command += ["-Wl,--default-symver"] if library == VERSIONED else []
        try:
            result = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            raise NullGPUError(f"null GPU: {compiler} cannot be run ({error}); it needs a C compiler") from None
        if result.returncode:
            raise NullGPUError(f"null GPU: {' '.join(command)} failed:\n{result.stderr}")
        os.replace(made, folder / library)
    return folder


def environment(
    capability: tuple[int, int] = (9, 0), base: dict[str, str] | None = None, plays: str | None = None
) -> dict[str, str]:
    """The environment in which a command finds the null GPU.

    Args:
        capability: what it says it is; its shared memory is that of the kernels' table.
        base: the environment to start from (default: this process's).
        plays: the name of the GPU for which graphs are made: the null GPU is called that and has cuDNN, as far as
            shapes and layouts go. Keys of Inductor's cache hold both.

    Raises:
        NullGPUError: as `build`, or an unknown capability.
    """
    from simmp_fast.kernels.configs import SHARED_LIMITS

    if capability not in SHARED_LIMITS:
        known = ", ".join(f"{a}.{b}" for a, b in SHARED_LIMITS)
        raise NullGPUError(f"--capability: got {capability[0]}.{capability[1]}, expected one of {known}")
    folder, made = build(), dict(os.environ if base is None else base)

    def front(name: str, *values: object) -> None:
        made[name] = os.pathsep.join([*map(str, values), *filter(None, [made.get(name)])])

    front("LD_LIBRARY_PATH", folder)
    front("LD_PRELOAD", *(folder / name for name in PRELOADED))
    front("PYTHONPATH", HERE / "site", HERE.parents[1])
    front("PATH", HERE / "bin")
    made["TRITON_LIBCUDA_PATH"] = str(folder)
    made["NULLGPU_CAPABILITY"] = f"{capability[0]}.{capability[1]}"
    made["NULLGPU_NAME"] = f"{NAME} sm_{capability[0]}{capability[1]}" if plays is None else plays
    made["NULLGPU_CUDNN"] = "" if plays is None else "1"
    made["NULLGPU_SHARED"] = str(SHARED_LIMITS[capability])
    made["NULLGPU_PROCESSORS"] = str(PROCESSORS.get(capability, PROCESSORS[9, 0]))
    plugin = "-p bench.nullgpu.unjudged"
    if plugin not in made.get("PYTEST_ADDOPTS", ""):
        made["PYTEST_ADDOPTS"] = f"{plugin} {made.get('PYTEST_ADDOPTS', '')}".strip()
    return made


def present() -> bool:
    """Whether this process runs on the null GPU, whatever that is called."""
    return hasattr(ctypes.CDLL(None), "nullgpu_launches")


def counters() -> dict[str, int]:
    """Launches, waits and graph launches of this process so far; for a process that runs on the null GPU.

    Raises:
        NullGPUError: this process does not.
    """
    runtime = ctypes.CDLL(None)
    if not present():
        raise NullGPUError("null GPU: this process does not run on it")
    driver = ctypes.CDLL("libcuda.so.1")
    read = lambda library, name: int(ctypes.c_long.in_dll(library, name).value)  # noqa: E731
    return {
        "launches": read(runtime, "nullgpu_launches") + read(driver, "nullgpu_driver_launches"),
        "waits": read(runtime, "nullgpu_waits"),
        "graph_launches": read(runtime, "nullgpu_graph_launches"),
    }


def run(command: list[str], capability: tuple[int, int] = (9, 0), plays: str | None = None) -> None:
    """Become `command`, on the null GPU; "python" is this interpreter."""
    if command[0] in ("python", "python3"):
        command = [sys.executable, *command[1:]]
    os.execvpe(command[0], command, environment(capability, plays=plays))
