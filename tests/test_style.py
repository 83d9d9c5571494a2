"""The house rules that a program can check."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("simmp_fast", "bench", "tests")
SOURCES = [p for folder in FOLDERS for p in sorted((ROOT / folder).rglob("*.py"))]


def run(*command: str) -> None:
    result = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.skipif(find_spec("ruff") is None, reason="ruff is not installed")
@pytest.mark.parametrize("command", [("check", "."), ("format", "--check", ".")], ids=["check", "format"])
def test_ruff(command: tuple[str, ...]) -> None:
    run("ruff", *command)


@pytest.mark.skipif(find_spec("mypy") is None, reason="mypy is not installed")
def test_types() -> None:
    run("mypy")


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_file_is_small(path: Path) -> None:
    limit = 600 if "kernels" in path.parts else 400
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= limit, f"{path.relative_to(ROOT)}: {lines} lines, at most {limit}"


# Modules that use nothing but one another, for all that is no operator.
LEAVES = {"bounds", "config", "console", "differences", "documents", "files", "folders", "messages", "signals"}
ARROWS = {
    "reference": {"validation"},
    "portable": {"ranks", "validation"},
    "kernels": {"limits", "validation", "ops"},
    "parallel": {"ops", "portable", "ranks", "validation"},
    "model": LEAVES | {"ops", "parallel", "ranks", "validation"},
    "data": LEAVES,
    "evaluation": LEAVES | {"data", "model", "pictures", "validation"},
    "training": LEAVES | {"data", "evaluation", "model", "ops", "parallel", "pictures", "ranks"},
}


@pytest.mark.parametrize("package", sorted(ARROWS))
def test_arrows_point_one_way(package: str) -> None:
    """A package imports nothing of its siblings but what the design names."""
    found = set()
    for path in (ROOT / "simmp_fast" / package).rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        found |= set(re.findall(r"^\s*from simmp_fast\.(\w+)", text, re.M))
        depth = len(path.relative_to(ROOT / "simmp_fast" / package).parts)
        dots = r"\." * (depth + 1)
        found |= set(re.findall(rf"^\s*from {dots}(\w+)", text, re.M))
        found |= {
            name for line in re.findall(rf"^\s*from {dots} import ([\w, ]+)", text, re.M) for name in line.split(", ")
        }
    assert found - {package} <= ARROWS[package]


@pytest.mark.parametrize(
    "blocked", ["triton", "nibabel,nilearn,h5py,sklearn,matplotlib,tensorboard,tifffile,imagecodecs"]
)
def test_imports_without_optional_packages(blocked: str) -> None:
    """Everything but the kernels imports where Triton, or what reads files and draws, is missing."""
    modules = [
        ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for p in SOURCES
        if p.parts[len(ROOT.parts)] == "simmp_fast" and "kernels" not in p.parts
    ]
    code = (
        f"import sys; blocked = {blocked.split(',')!r}\n"
        "for name in blocked: sys.modules[name] = None\n"
        f"import importlib\nfor name in {modules!r}: importlib.import_module(name)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
