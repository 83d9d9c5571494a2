"""Measure configurations of the kernels on the GPU at hand and keep the fastest.

    python -m simmp_fast.kernels.tune                          # every kernel, bfloat16 and float32
    python -m simmp_fast.kernels.tune context_forward          # some kernels, in the order they are named
    python -m simmp_fast.kernels.tune --first context_forward:96 powerset_loss_sums    # all, but these before the rest
    python -m simmp_fast.kernels.tune --dtype half             # one dtype class
    python -m simmp_fast.kernels.tune --minutes 9              # stop then; what was found is kept
    python -m simmp_fast.kernels.tune --precompile FILE        # compile and judge the first round's candidates only
    python -m simmp_fast.kernels.tune --candidates FILE        # time these alone, compile nothing else
    python -m simmp_fast.kernels.tune --dry-run                # what there is to tune, in order, without a GPU

Rows descend one after the other, the most important ones first. In a round every number of a row's best configuration
is changed, one at a time (a tile also with its warps); these candidates are compiled, several at the same time, which
leaves the machine code in Triton's cache; then they are timed, alone on the GPU. A row goes on from its fastest
candidate while that gains 2 %. What spills, needs more shared memory than the device has, or leads to other results is
never taken. Compiling and timing are done in processes of their own: a candidate that fails costs no other. Rows go to
`measured.txt` as they are found; bring docs/kernels/resources.txt up to date afterwards.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
import triton

from .apart import PATIENCE, isolated, one_by_one
from .candidates import candidates_of, precompile
from .configs import MEASURED, Config, device_limits
from .measure import compiled, timed_each
from .search import Descent, Subject, Target, key, plan, row_text

# Processes that compile at the same time, each with a workload of its own; the seconds that one timing may take.
MOST_JOBS, TIMING = 14, 60.0
Compile = Callable[[Subject, Config, Target, float], Config | str]
Times = Iterable[tuple[Config, float | str]]
TimeEach = Callable[[Subject, Sequence[Config], Config, Target, float], Times]


def compiled_apart(subject: Subject, config: Config, target: Target, end: float) -> Config | str:
    """`compiled` in a process of its own, not beyond a time of `time.monotonic`."""
    seconds = min(PATIENCE, end - time.monotonic())
    found: Config | str = (
        isolated(compiled, subject, config, target, seconds=seconds) if seconds > 0 else "no time left"
    )
    return found


def timed_apart(subject: Subject, configs: Sequence[Config], start: Config, target: Target, end: float) -> Times:
    """`timed_each` in a process of its own."""
    return one_by_one(timed_each, configs, subject, start, target, seconds=TIMING, end=end)


def keep(text: str, path: Path = MEASURED) -> None:
    """Write a row to the file of measured rows in place of an older one of the same kernel, dtype, width, device and
    Triton version.
    """
    same = text.split()[:4]
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    lines = [line for line in lines if line.split()[:4] != same]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("\n".join([*lines, text]) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _race(
    subject: Subject, descent: Descent, configs: Sequence[Config], target: Target, end: float, time_each: TimeEach,
    note: str, path: Path,
) -> bool:  # fmt: skip
    """Time the best configuration and its rivals, keep a row as soon as one gains; whether there is a time to beat."""
    start = descent.best
    descent.done = True
    times = iter(time_each(subject, [start, *configs], start, target, end))
    first = next(times, None)
    if first is None:  # no time was left
        return False
    answer = first[1]
    if isinstance(answer, str):
        print(f"{subject}: the row in use cannot run ({answer})", file=sys.stderr, flush=True)
        return False
    descent.begin(answer)
    for config, answer in times:
        if isinstance(answer, str):
            print(f"  {subject} {key(config)}: {answer}", file=sys.stderr, flush=True)
        elif descent.take(config, answer):
            descent.done = False
            gain = f"{descent.first / descent.time:.2f}x"
            row = replace(config, dtype=descent.start.dtype)
            keep(row_text(row, target.capability, f"{gain}{note and ', '}{note}"), path)
            print(f"{subject}: {descent.first:.4f} -> {descent.time:.4f} ms, {gain} {key(row)}", flush=True)
    return True


def tune(
    subjects: Sequence[Subject],
    target: Target,
    *,
    jobs: int = 1,
    seconds: float = math.inf,
    compile: Compile = compiled_apart,
    time_each: TimeEach = timed_apart,
    note: str = "",
    path: Path = MEASURED,
) -> dict[Subject, Descent]:
    """Descend from the rows in use, one after the other, and keep what is faster.

    Args:
        subjects: of `plan`, the most important ones first.
        target: the device.
        jobs: candidates that are compiled at the same time.
        seconds: all stops after them.
        compile, time_each: what is done with candidates.
        note: device and versions, for the rows that are written.
        path: file of the measured rows.

    Returns:
        where each row ended; one that could not run at all is missing, and named on the standard error, and so is one
        that was not reached.
    """
    end = time.monotonic() + seconds
    descents: dict[Subject, Descent] = {}
    for subject in subjects:
        descent = Descent(subject.row(target))
        while not descent.done and time.monotonic() < end:
            waiting = descent.candidates()
            with ThreadPoolExecutor(jobs) as pool:
                answers = list(pool.map(lambda config, row=subject: compile(row, config, target, end), waiting))
            if time.monotonic() >= end:
                break
            for config, found in zip(waiting, answers, strict=True):
                if isinstance(found, str):
                    print(f"  {subject} {key(config)}: {found}", file=sys.stderr, flush=True)
            usable = [found for found in answers if isinstance(found, Config)]
            if not _race(subject, descent, usable, target, end, time_each, note, path):
                break
            descents[subject] = descent
    return descents


def time_candidates(
    candidates: dict[Subject, list[Config]],
    target: Target,
    *,
    seconds: float = math.inf,
    time_each: TimeEach = timed_apart,
    note: str = "",
    path: Path = MEASURED,
) -> dict[Subject, Descent]:
    """One round over candidates that are compiled already, one row after the other; otherwise as `tune`.

    Args:
        candidates: of every row, the most important ones first.
        target, seconds, time_each, note, path: as in `tune`.
    """
    end = time.monotonic() + seconds
    descents: dict[Subject, Descent] = {}
    for subject, configs in candidates.items():
        if time.monotonic() >= end:
            break
        descent = Descent(subject.row(target))
        if _race(subject, descent, configs, target, end, time_each, note, path):
            descents[subject] = descent
    return descents


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m simmp_fast.kernels.tune", description=__doc__.split("\n")[0])
    parser.add_argument("kernels", nargs="*", help="names in the table, the most important first (default: all)")
    parser.add_argument(
        "--first", nargs="*", default=[], metavar="KERNEL[:WIDTH]", help="rows that come before the rest"
    )
    parser.add_argument("--dtype", nargs="*", default=["half", "float32"], help="half, float32, tf32")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after them (default: no limit)")
    parser.add_argument("--jobs", type=int, help="processes that compile (default: the processors but one, up to 14)")
    parser.add_argument("--out", type=Path, default=MEASURED, help="file of the measured rows (default: the table's)")
    parser.add_argument("--dry-run", action="store_true", help="list what would be tuned, in order")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--precompile", type=Path, metavar="FILE", help="compile and judge candidates, time nothing")
    what.add_argument("--candidates", type=Path, metavar="FILE", help="time the candidates of --precompile, no others")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns 1 where there is nothing to measure on or nothing to time, 2 for a wrong argument."""
    began, options = time.monotonic(), _options(arguments)
    try:
        wanted = list(plan(options.kernels, options.dtype, options.first))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if options.dry_run:
        print("\n".join(map(str, wanted)))
        return 0
    if options.candidates is not None and not options.candidates.is_file():
        print(f"--candidates: got {options.candidates}, which is no file", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("tune: no CUDA device is present; --dry-run lists what there is to tune", file=sys.stderr)
        return 1
    index = torch.cuda.current_device()
    target = Target(index, *device_limits(index))
    note = f"{torch.cuda.get_device_name(index)}, torch {torch.__version__}, triton {triton.__version__}"
    jobs = options.jobs or max(1, min(MOST_JOBS, len(os.sched_getaffinity(0)) - 1))
    seconds = 60 * options.minutes - (time.monotonic() - began)
    if options.precompile is not None:
        new, usable = precompile(wanted, target, options.precompile, jobs=jobs, seconds=seconds)
        print(f"{new} candidates more are in {options.precompile}, {usable} of them can be used")
        return 0
    if options.candidates is not None:
        found = candidates_of(options.candidates, wanted, target)
        wanted = [subject for subject in wanted if subject in found]
        if not wanted:
            print(f"--candidates: {options.candidates} has none of this device, Triton and code", file=sys.stderr)
            return 1
        ordered = {subject: found[subject] for subject in wanted}
        ends = time_candidates(ordered, target, seconds=seconds, note=note, path=options.out)
    else:
        ends = tune(wanted, target, jobs=jobs, seconds=seconds, note=note, path=options.out)
    missing = [str(subject) for subject in wanted if subject not in ends]
    if missing:
        print(f"{len(missing)} of {len(wanted)} rows were not timed: {', '.join(missing)}", file=sys.stderr)
    print(f"rows are in {options.out}; now run: python -m simmp_fast.kernels.compile")
    return 0


if __name__ == "__main__":
    sys.exit(main())
