"""Deterministic weights for the golden cases: any implementation can rebuild them from names and shapes.

Value i of tensor `name` is uniform in [-1, 1) from SplitMix64 over (crc32(name) + seed, i), then scaled by role.
"""

import zlib

import numpy as np

ATTENTION_GAIN = 0.8  # names that hold "DSGIM" or "decoder"
DEFAULT_GAIN = 1.1


def uniform(name: str, count: int, seed: int = 0) -> np.ndarray:
    """[count] float64 in [-1, 1)."""
    with np.errstate(over="ignore"):
        z = np.arange(count, dtype=np.uint64) + np.uint64((zlib.crc32(name.encode()) + seed) << 32)
        z = z * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)).astype(np.float64) / 2.0**52 - 1.0


def tensor(name: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """float32 array for the tensor `name` of a released state dict (floating-point tensors only)."""
    v = uniform(name, int(np.prod(shape)) if shape else 1, seed)
    leaf = name.split(".")[-1]
    if leaf == "running_var":
        v = 1.0 + 0.1 * v
    elif leaf == "running_mean":
        v = 0.1 * v
    elif leaf in ("concept_pool", "concept_proto"):
        pass
    elif len(shape) >= 2:
        gain = ATTENTION_GAIN if "DSGIM" in name or "decoder" in name else DEFAULT_GAIN
        v = v * np.sqrt(3.0 / np.prod(shape[1:])) * gain
    elif leaf == "weight":
        v = 1.0 + 0.1 * v
    else:
        v = 0.05 * v
    return v.reshape(shape).astype(np.float32)
