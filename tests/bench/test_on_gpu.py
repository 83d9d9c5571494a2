"""The stages of `bench/on_gpu.sh`, with an interpreter that only notes what it is asked for."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from bench import profile
from bench.backends import BACKENDS
from simmp_fast.cli import main
from simmp_fast.kernels import tune

ROOT = Path(__file__).parents[2]
STAGES = ("check", "sanitize", "tune", "step", "compiled", "operators", "sweeps", "report", "demo")


def stage(folder: Path, name: str) -> tuple[subprocess.CompletedProcess[str], list[list[str]]]:
    """The ended script, and the arguments of every call of Python that it made."""
    calls, python = folder / "calls", folder / "python"
    note = f'printf "%q " "$@" >> {shlex.quote(str(calls))}; echo >> {shlex.quote(str(calls))}'
    python.write_text(f"#!/usr/bin/env bash\n{note}\n", encoding="utf-8")
    python.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(python), "SIMMP_FAST_DEMO_CACHE": "cache"}
    command = ["bash", str(ROOT / "bench" / "on_gpu.sh"), *([name, str(folder / "out")] if name else [])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    lines = calls.read_text(encoding="utf-8").splitlines() if calls.exists() else []
    found = [shlex.split(line) for line in lines]
    return done, [call for call in found if call[0] == "-m"]


@pytest.mark.parametrize("name", [s for s in STAGES if s != "sanitize"])
def test_a_stage_asks_for_what_there_is(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done, calls = stage(tmp_path, name)
    assert done.returncode == 0, done.stderr
    assert calls
    for call in calls:
        module, arguments = call[1], call[2:]
        if module == "pytest":
            assert (ROOT / arguments[0]).is_dir()
        elif module == "simmp_fast.kernels.tune":
            assert tune.main([*arguments, "--dry-run"]) == 0
        elif module == "bench.profile":
            assert profile.main([*arguments, "--device", "cpu"]) == 2
            assert f"{arguments[1]!r} cannot run here" in capsys.readouterr().err
        elif "--merge" in arguments:
            assert arguments[-1].endswith("/out/*/results.jsonl")
        elif arguments[0] == "bench":
            assert main([*arguments, "--list", "--device", "cpu"]) == 0
            named = arguments[arguments.index("--backend") + 1 :] if "--backend" in arguments else []
            assert set(named[: named.index("--out")] if named else []) <= BACKENDS.keys()
        elif arguments:
            with pytest.raises(SystemExit):
                main([arguments[0], "--help"])
            options = {argument for argument in arguments if argument.startswith("--")}
            assert options <= set(capsys.readouterr().out.replace(",", " ").split())


def test_usage_and_an_unknown_stage(tmp_path: Path) -> None:
    done, _ = stage(tmp_path, "")
    assert done.returncode == 2
    assert all(f"on_gpu.sh {name} OUT" in done.stderr for name in STAGES)
    done, _ = stage(tmp_path, "everything")
    assert done.returncode == 2
    assert "got 'everything', expected check, sanitize" in done.stderr
