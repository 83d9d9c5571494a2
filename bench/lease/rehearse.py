"""The whole lease without a GPU: from a copy of the tree as it travels, on the null GPU, and cut at many moments.

Nothing is computed, so nothing of it is a result; what is seen is that every program runs to its end, how the limits
hold, and that what is left of a call that was killed is whole.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from .. import nullgpu
from . import table
from .execute import BUNDLE, CUT, MISSING, MOST_FILES, OK, RECORD, RESULTS, ROOT, TESTS
from .plan import CALLS
from .record import read

# Folders that do not travel.
LEFT_HERE = (".git", ".venv", "demo", "runs", "bench-results", "__pycache__", "*.egg-info", ".*_cache", ".hypothesis")
FIRST_CUT, BETWEEN_CUTS = 3.0, 2.0


def copy_tree(target: Path) -> Path:
    """The tree as it travels to a GPU machine: without git's folder, environments and results."""
    shutil.copytree(ROOT, target, ignore=shutil.ignore_patterns(*LEFT_HERE), dirs_exist_ok=True)
    return target


def faults(out: Path) -> list[str]:
    """What is wrong with the files of a call, however it ended; empty where all are whole."""
    wrong = []
    files = sorted(out.iterdir())
    if len(files) > MOST_FILES:
        wrong.append(f"{len(files)} files, at most {MOST_FILES} come home: {', '.join(path.name for path in files)}")
    for name in (RECORD, RESULTS, TESTS):
        path = out / name
        text = path.read_bytes() if path.exists() else b""
        whole, lines = text.count(b"\n"), len(list(read(path)))
        if lines < whole:
            wrong.append(f"{name}: {whole - lines} of {whole} lines cannot be read")
    if (out / BUNDLE).exists():
        try:
            with tarfile.open(out / BUNDLE) as bundle:
                for member in bundle:
                    file = bundle.extractfile(member)
                    if file is not None:
                        file.read()
        except (OSError, EOFError, tarfile.TarError) as error:
            wrong.append(f"{BUNDLE}: {type(error).__name__}: {error}")
    try:
        table.summary(out)
    except Exception as error:  # whatever is left must be readable
        wrong.append(f"the table cannot be made: {type(error).__name__}: {error}")
    return wrong


def cut(command: Sequence[str], seconds: float, environment: dict[str, str], folder: Path) -> int | None:
    """Run a command and kill it after some seconds; its exit status where it ended before."""
    with open(os.devnull, "wb") as nothing:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdin=nothing, stdout=nothing, stderr=nothing, start_new_session=True
        )
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return None


def rehearse(
    out: Path,
    warm: Path | None,
    cuts: int,
    stretch: float,
    calls: Sequence[str],
    say: Callable[[str], None] = lambda text: print(text, flush=True),
) -> int:
    """Run the calls, then one that is cut and goes on again and again; 0 where nothing was wrong.

    Args:
        out: each call leaves what would come home in a folder of its name there.
        warm: archive of compiled kernels.
        cuts: how often the last of the calls is killed.
        stretch: factor on all limits, for a machine with fewer cores than the one with the GPU.
        calls: names in the plan.
        say: takes each line about what happens.
    """
    wrong: list[str] = []
    out = out.resolve()
    with tempfile.TemporaryDirectory(prefix="simmp_fast_rehearsal_") as scratch:
        tree, work = copy_tree(Path(scratch) / "tree"), Path(scratch) / "work"
        environment = nullgpu.environment()
        # The definition selects rows by a mask: with one that nobody computed, its runs ask for any amount of memory.
        environment.pop("SIMMP_FAST_DEMO_CACHE", None)
        python = [sys.executable, "-m", "bench.lease"]

        def arguments(name: str, folder: Path) -> list[str]:
            more = ["--warm", str(warm.resolve())] if warm is not None and name == calls[0] else []
            return [*python, name, str(folder), "--work", str(work), "--stretch", str(stretch), *more]

        for name in calls:
            begun = time.monotonic()
            shutil.rmtree(out / name, ignore_errors=True)
            status = subprocess.run(arguments(name, out / name), cwd=tree, env=environment).returncode
            limit = stretch * CALLS[name].seconds
            took = time.monotonic() - begun
            say(f"{name}: exit status {status} after {took:.0f} of {limit:.0f} s")
            wrong += [f"{name}: {fault}" for fault in faults(out / name)]
            if took > limit:
                wrong.append(f"{name}: took {took:.0f} s, its limit is {limit:.0f}")
            for line in read(out / name / RECORD):
                if line.get("event") == "ended" and line.get("status") not in (OK, CUT, MISSING):
                    wrong.append(f"{name}: {line['stage']} ended with {line['status']}")
        for number in range(cuts):
            shutil.rmtree(out / "cut-before", ignore_errors=True)
            if (out / "cut").exists():
                (out / "cut").rename(out / "cut-before")
            name = calls[number % len(calls)]
            command = [*arguments(name, out / "cut"), "--done", str(out / "cut-before" / RECORD)]
            seconds = FIRST_CUT + BETWEEN_CUTS * number
            status = cut(command, seconds, environment, tree)
            found = faults(out / "cut") if (out / "cut").exists() else []
            lines = sum(1 for _ in read(out / "cut" / RECORD))
            tests, rows = (sum(1 for _ in read(out / "cut" / file)) for file in (TESTS, RESULTS))
            say(f"{name} cut after {seconds:g} s: {lines} lines of record, {tests} of tests, {rows} rows")
            wrong += [f"{name} cut after {seconds:g} s: {fault}" for fault in found]
    say("\n".join(wrong) if wrong else "nothing was wrong")
    return 1 if wrong else 0
