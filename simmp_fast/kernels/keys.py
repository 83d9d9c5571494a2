"""Triton's cache keys, the same in every process.

The key of a kernel covers the constants of the functions that it calls. Triton before 3.8 takes them from those alone
whose own key is already known: a kernel's key then depends on what the process launched before, and kernels that
another program compiled are not found.
"""

from __future__ import annotations

import sys

from triton.runtime.jit import JITFunction


def settle_keys(package: str) -> None:
    """Compute the keys of all functions in a package's loaded modules, callees first as the modules define them."""
    for name, module in list(sys.modules.items()):
        if name.startswith(f"{package}."):
            for value in vars(module).values():
                if isinstance(value, JITFunction):
                    value.cache_key  # noqa: B018  Triton keeps it
