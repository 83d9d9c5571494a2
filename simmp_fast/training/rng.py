"""The states of all global random number generators, in types that load without unpickling code."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def seed_all(seed: int) -> None:
    """Seed Python, NumPy and PyTorch on every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - libraries may draw from it
    torch.manual_seed(seed)


def capture() -> dict[str, Any]:
    """The states of the generators of Python, NumPy, PyTorch on the CPU and on every GPU."""
    _, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002
    return {
        "python": random.getstate(),
        "numpy": [torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, gauss],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all(),
    }


def restore(states: dict[str, Any]) -> None:
    """Set the generators to states from `capture`; those of GPUs that are not there now are left out."""
    random.setstate(states["python"])
    keys, position, has_gauss, gauss = states["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, gauss))  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    for device in range(min(torch.cuda.device_count(), len(states["cuda"]))):
        torch.cuda.set_rng_state(states["cuda"][device], device)
