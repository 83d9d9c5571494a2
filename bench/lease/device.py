"""What the GPU machine is, as one JSON line; exit status 1 where it has no GPU."""

from __future__ import annotations

import hashlib
import json
import sys
from typing import Any

import torch

from .. import environment


def software() -> dict[str, Any]:
    """What Triton's cache keys depend on beside the kernels themselves; empty without Triton."""
    try:
        from triton.backends.nvidia.compiler import get_ptxas_version
        from triton.runtime.cache import triton_key
    except ImportError:
        return {}
    key = hashlib.sha256(triton_key().encode()).hexdigest()[:16]
    return {"triton_key": key, "ptxas": hashlib.sha256(get_ptxas_version(90).encode()).hexdigest()[:16]}


def main() -> int:
    """Print the line."""
    if not torch.cuda.is_available():
        print(json.dumps({"gpu": None, "torch": torch.__version__}))
        return 1
    print(json.dumps({**environment.describe(torch.device("cuda")), **software()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
