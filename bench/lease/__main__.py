"""The command: `python -m bench.lease --help`."""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from . import BEGUN, table
from . import __doc__ as about
from .execute import RECORD, ROOT, Runner, done_before
from .plan import CALLS, PYTHON, Call, Stage

WORK = Path(tempfile.gettempdir()) / "simmp_fast_lease"
DEVICE_SECONDS, UNPACK_SECONDS = 60, 60


def plan_text() -> str:
    """The stages of all calls."""
    lines = []
    for call in CALLS.values():
        lines.append(f"{call.name}: at most {call.seconds:g} s; {call.about}")
        for number, wave in enumerate(call.waves, 1):
            lines += [f"  {number:2d}. {stage.name:32s} {stage.seconds:4g} s" for stage in wave]
    return "\n".join(lines)


def chosen(call: Call, only: Sequence[str], leave_out: Sequence[str]) -> Call:
    """The call with some of its stages.

    Raises:
        ValueError: a name that is none of its stages.
    """
    known = [stage.name for wave in call.waves for stage in wave]
    for name in (*only, *leave_out):
        if name not in known:
            raise ValueError(f"stage: got {name!r}, expected some of {', '.join(known)}")
    waves = [
        tuple(stage for stage in wave if (not only or stage.name in only) and stage.name not in leave_out)
        for wave in call.waves
    ]
    return replace(call, waves=tuple(wave for wave in waves if wave))


def stretched(call: Call, factor: float) -> Call:
    """The call with longer limits, for a machine with fewer cores."""
    waves = tuple(tuple(replace(stage, seconds=factor * stage.seconds) for stage in wave) for wave in call.waves)
    return replace(call, seconds=factor * call.seconds, waves=waves)


def find_device(runner: Runner) -> bool:
    """Note what GPU there is; whether there is one."""
    command = [sys.executable, "-m", "bench.lease.device"]
    try:
        result = subprocess.run(
            command, cwd=ROOT, env=runner.environment, capture_output=True, text=True, timeout=DEVICE_SECONDS
        )
        found = json.loads((result.stdout.strip().splitlines() or ["{}"])[-1])
    except (subprocess.TimeoutExpired, ValueError) as error:
        found = {"error": f"{type(error).__name__}: {error}"[:300]}
    runner.note(event="device", **found)
    runner.commit = found.get("commit")
    return bool(found.get("gpu"))


def run(options: argparse.Namespace) -> int:
    """One call on the GPU machine: 0 if every stage ended well, 1 if not, 2 without a GPU or for a wrong argument."""
    call = CALLS[options.command]
    try:
        call = chosen(call, options.only or (), options.without or ())
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    call = stretched(call, options.stretch)
    earlier = [*options.done, options.out / RECORD]
    before = done_before(earlier) - set(options.again)
    runner = Runner(options.out, options.work, before)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: runner.stop())
    if not find_device(runner):
        print("lease: no CUDA device is present here; python -m bench.lease rehearse needs none", file=sys.stderr)
        return 2
    first = []
    if options.warm is not None:
        command = (PYTHON, "-m", "bench.warm", "unpack", str(options.warm.resolve()), "--to", "{cache}")
        first = [Stage("unpack", command, UNPACK_SECONDS)]
    try:
        seconds = options.seconds or call.seconds
        return runner.run(call, seconds - (time.monotonic() - BEGUN), first)
    except KeyboardInterrupt:
        print("lease: cut; what was found until then is in the folder", file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    """The sub-commands and their options."""
    top = argparse.ArgumentParser(
        prog="python -m bench.lease", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = top.add_subparsers(dest="command", required=True)
    commands.add_parser("plan", help="the stages, and how long each may take")
    for call in CALLS.values():
        one = commands.add_parser(call.name, help=call.about)
        one.add_argument("out", type=Path, help="folder for what comes home: at most 8 files, whole at any moment")
        one.add_argument("--seconds", type=float, help=f"for the whole call (default: {call.seconds:g})")
        one.add_argument("--stretch", type=float, default=1.0, help="factor on all limits (default: 1)")
        one.add_argument("--warm", type=Path, help="compiled kernels to unpack first (python -m bench.warm)")
        one.add_argument("--work", type=Path, default=WORK, help=f"caches and logs (default: {WORK})")
        one.add_argument(
            "--done", type=Path, nargs="*", default=[], metavar="FILE", help="lease.jsonl of earlier calls: go on there"
        )
        one.add_argument("--again", nargs="*", default=[], metavar="STAGE", help="also if it is done")
        one.add_argument("--only", nargs="*", metavar="STAGE", help="these stages alone")
        one.add_argument("--without", nargs="*", metavar="STAGE", help="all but these stages")
    shown = commands.add_parser("table", help="the short table of a folder that came home")
    shown.add_argument("out", type=Path)
    rehearsal = commands.add_parser("rehearse", help="all calls, and cuts of them, on the null GPU")
    rehearsal.add_argument("out", type=Path)
    rehearsal.add_argument("--warm", type=Path, help="compiled kernels, as the GPU machine gets them")
    rehearsal.add_argument("--cuts", type=int, default=20, help="moments at which a call is cut (default: 20)")
    rehearsal.add_argument("--stretch", type=float, default=1.0, help="factor on all limits (default: 1)")
    rehearsal.add_argument("--calls", nargs="*", default=list(CALLS), choices=list(CALLS))
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    options = parser().parse_args(arguments)
    if options.command == "plan":
        print(plan_text())
        return 0
    if options.command == "table":
        if not (options.out / RECORD).is_file():
            print(f"out: got {options.out}, which has no {RECORD}", file=sys.stderr)
            return 2
        print(table.summary(options.out))
        return 0
    if options.command == "rehearse":
        from .rehearse import rehearse

        return rehearse(options.out, options.warm, options.cuts, options.stretch, options.calls)
    return run(options)


if __name__ == "__main__":
    sys.exit(main())
