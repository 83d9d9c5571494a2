"""The pinned launch configurations: a table a person can read, and a lookup that never asks for memory a device
lacks.

Each family of kernels keeps its rows as text in its own `table.py` and calls `register_table`. A row names the
kernel, the dtype class, the largest head dim (or other width) it serves, the compute capabilities it is for, the
tile sizes, warps and pipeline stages, the shared memory it needs there, the stack a thread spills (0 unless
explained) and where the row comes from. Lengths (N, B, T) are never a key: a step with another image size never
meets an untried configuration. Rows that `tune` measured on a device stand in `measured.txt` and come first there,
under the Triton version they name: another one makes other machine code of them, with other registers.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import triton

# The version that a measured row belongs to: major and minor.
VERSION = ".".join(triton.__version__.split(".")[:2])
# Largest shared memory of one block by compute capability, in bytes (CUDA programming guide, table of capabilities).
SHARED_LIMITS = {
    (8, 0): 163 * 1024,
    (8, 6): 99 * 1024,
    (8, 7): 163 * 1024,
    (8, 9): 99 * 1024,
    (9, 0): 227 * 1024,
    (10, 0): 227 * 1024,
    (10, 3): 227 * 1024,
    (12, 0): 99 * 1024,
    (12, 1): 99 * 1024,
}
TARGETS = ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))
GROUPS = {
    "all": TARGETS,
    "large": ((8, 0), (9, 0), (10, 0)),  # 163 KiB of shared memory and more
    "small": ((8, 6), (8, 9), (12, 0)),  # 99 KiB
    "mma": ((8, 0), (8, 6), (8, 9), (12, 0)),  # products by warps, from registers
    "wide": ((9, 0), (10, 0)),  # products by warp groups, from shared memory
}
PROVENANCE = ("ahead-of-time", "measured")
DTYPE_CLASSES = ("half", "float32", "tf32", "any")


@dataclass(frozen=True)
class Config:
    """One launch configuration: tile sizes by name, warps, stages, and what it was seen to need.

    `version` is that of Triton (major and minor) under which a row was measured; a pinned row is for any and has "".
    """

    kernel: str
    dtype: str
    width: int
    capabilities: tuple[tuple[int, int], ...]
    tiles: dict[str, int] = field(hash=False)
    warps: int
    stages: int
    shared: int
    stack: int
    provenance: str
    note: str = ""
    version: str = ""


_TABLES: dict[str, list[Config]] = {}
_FORCED: dict[str, Config] = {}
# Written by `python -m simmp_fast.kernels.tune`, read when the kernels are imported.
MEASURED = Path(__file__).with_name("measured.txt")


def _capabilities(text: str) -> tuple[tuple[int, int], ...]:
    found: list[tuple[int, int]] = []
    for part in text.split(","):
        if part in GROUPS:
            found.extend(GROUPS[part])
        else:
            major, minor = part.split(".")
            found.append((int(major), int(minor)))
    return tuple(found)


def _row(line: str) -> Config:
    """``kernel dtype width capabilities NAME=n,NAME=n warps stages shared_KiB stack provenance [# note]``

    A measured row has its Triton version behind the capability: ``9.0@3.6``.
    """
    body, _, note = line.partition("#")
    fields = body.split()
    if len(fields) != 10:
        raise ValueError(f"configuration row: got {len(fields)} columns in {line!r}, expected 10")
    kernel, dtype, width, where, tiles, warps, stages, shared, stack, provenance = fields
    if dtype not in DTYPE_CLASSES or provenance not in PROVENANCE:
        raise ValueError(f"configuration row: got dtype {dtype!r} and provenance {provenance!r} in {line!r}")
    if int(stack) and not note.strip():
        raise ValueError(f"configuration row: got stack {stack} without a reason in {line!r}")
    where, _, version = where.partition("@")
    if bool(version) != (provenance == "measured"):
        raise ValueError(
            f"configuration row: got provenance {provenance!r} and Triton version {version!r} in {line!r}, expected a "
            "version (9.0@3.6) in measured rows alone"
        )
    sizes = {} if tiles == "-" else {k: int(v) for k, v in (t.split("=") for t in tiles.split(","))}
    return Config(
        kernel, dtype, int(width), _capabilities(where), sizes, int(warps), int(stages),
        int(float(shared) * 1024), int(stack), provenance, note.strip(), version,
    )  # fmt: skip


def register_table(text: str) -> None:
    """Add the rows of a table; empty lines and lines that begin with ``#`` are skipped."""
    for line in text.splitlines():
        if line.strip() and not line.lstrip().startswith("#"):
            row = _row(line)
            _TABLES.setdefault(row.kernel, []).append(row)


def rows(kernel: str | None = None) -> list[Config]:
    """Every pinned configuration, or those of one kernel, in table order."""
    if kernel is not None:
        return list(_TABLES.get(kernel, ()))
    return [row for table in _TABLES.values() for row in table]


def widths(kernel: str, dtype: str) -> list[int]:
    """The shape classes of a kernel: the largest width of each, rising."""
    return sorted({row.width for row in rows(kernel) if row.dtype in (dtype, "any")})


def _distance(row: Config, capability: tuple[int, int]) -> tuple[int, int]:
    """How far a row's nearest capability is: exact first, then an older minor of the same major, then any older one."""
    best = (3, 0)
    for major, minor in row.capabilities:
        if (major, minor) == capability:
            return (0, 0)
        if major == capability[0]:
            best = min(best, (1, abs(minor - capability[1])))
        elif major < capability[0]:
            best = min(best, (2, capability[0] - major))
    return best


@functools.cache
def lookup(
    kernel: str, dtype: str, width: int, capability: tuple[int, int], limit: int, version: str = VERSION
) -> Config:
    """The pinned configuration of a kernel for a width, on a device with `limit` bytes of shared memory a block.

    Args:
        kernel: name in the table.
        dtype: "half", "float32" or "tf32".
        width: head dim (or what the kernel's table calls width); the smallest class that holds it is taken.
        capability: compute capability of the device.
        limit: shared memory a block may have there, bytes; a row that needs more is never returned.
        version: of Triton; a row measured under another is never returned.

    Raises:
        ValueError: no class is wide enough, or nothing in the table fits the device.
    """
    fitting = [w for w in widths(kernel, dtype) if w >= width]
    if not fitting:
        largest = max(widths(kernel, dtype), default=0)
        raise ValueError(f"{kernel}: got a width of {width} in {dtype}, expected at most {largest}")
    allowed = _allowed(kernel, dtype, fitting[0], limit, version)
    if not allowed:
        raise ValueError(
            f"{kernel}: no configuration of width {fitting[0]} in {dtype} fits {limit} bytes of shared memory"
        )
    return min(allowed, key=lambda row: (_distance(row, capability), row.provenance != "measured"))


def _allowed(kernel: str, dtype: str, width: int, limit: int, version: str) -> list[Config]:
    """The rows of one shape class that may be taken on a device."""
    return [
        row
        for row in rows(kernel)
        if row.dtype in (dtype, "any") and row.width == width and row.shared <= limit and row.version in ("", version)
    ]


def unserved(kernel: str, dtype: str, limit: int, version: str = VERSION) -> list[tuple[int, float]]:
    """The widths for which `lookup` would find nothing that fits: more than the first number, up to the second.

    The last shape class counts without end: what is wider takes its row, or is refused by the kernel
    (`simmp_fast.limits`). Arguments as in `lookup`.
    """
    classes = widths(kernel, dtype)
    below, above = [0, *classes[:-1]], [*classes[:-1], math.inf]
    return [
        (least, most)
        for least, width, most in zip(below, classes, above, strict=True)
        if not _allowed(kernel, dtype, width, limit, version)
    ]


@functools.cache
def device_limits(index: int) -> tuple[tuple[int, int], int]:
    """Compute capability and shared memory a block may have, bytes, of CUDA device `index`."""
    properties = torch.cuda.get_device_properties(index)
    limit = getattr(properties, "shared_memory_per_block_optin", 0)
    capability = (properties.major, properties.minor)
    return capability, limit or SHARED_LIMITS.get(capability, 99 * 1024)


@contextlib.contextmanager
def forced(config: Config) -> Iterator[None]:
    """Launch a kernel with this configuration, whatever the table says; for `tune`."""
    _FORCED[config.kernel] = config
    try:
        yield
    finally:
        del _FORCED[config.kernel]


def pick(kernel: str, dtype: str, width: int, device: torch.device) -> Config:
    """`lookup` for the device at hand.

    The interpreter takes the configurations of half precision for every dtype: it has no memory to run out of, and its
    cost goes with the number of programs, which the larger tiles keep low.
    """
    if kernel in _FORCED:
        return _FORCED[kernel]
    if device.type != "cuda":
        kind = "half" if any(row.dtype == "half" for row in rows(kernel)) else dtype
        return lookup(kernel, kind, width, (8, 6), SHARED_LIMITS[8, 6])
    index = device.index if device.index is not None else torch.cuda.current_device()
    return lookup(kernel, dtype, width, *device_limits(index))
