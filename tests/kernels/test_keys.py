"""Keys of compiled kernels: another process finds what one has compiled, whatever either launched first."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

PROGRAM = """
import importlib, json, pkgutil, sys
from triton.runtime.jit import JITFunction
import simmp_fast.kernels as package

names = sorted(module.name for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."))
modules = [importlib.import_module(name) for name in names]
functions = [
    (f"{module.__name__}.{name}", value)
    for module in modules for name, value in vars(module).items() if isinstance(value, JITFunction)
]
unknown = [name for name, function in functions if function.hash is None]
keys = {name: function.cache_key for name, function in functions[:: int(sys.argv[1])]}
print(json.dumps({"unknown": unknown, "keys": keys}))
"""


def keys(step: int) -> dict[str, dict[str, str]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", PROGRAM, str(step)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, str]] = json.loads(done.stdout)
    return found


def test_keys_do_not_depend_on_what_was_launched_before() -> None:
    forwards, backwards = keys(1), keys(-1)
    assert len(forwards["keys"]) > 50
    assert forwards == backwards
    assert not forwards["unknown"], "known once the package is imported"
