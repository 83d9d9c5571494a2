"""Compile every pinned configuration for every target and keep the report of what each needs.

    python -m simmp_fast.kernels.compile                 # bring docs/kernels/resources.txt up to date
    python -m simmp_fast.kernels.compile --all           # compile every case again
    python -m simmp_fast.kernels.compile --only context  # print the cases whose label contains a word; writes nothing

No GPU is needed. The report names the Triton version and is comparable under that version alone.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import triton

from .aot import (
    MATRIX,
    UNMATCHED,
    Case,
    Resources,
    compile_case,
    compiled_kernel,
    faults,
    fingerprint,
    hazards_of,
    plan,
)
from .hazards import Kind

MIX = (*MATRIX, UNMATCHED)
REPORT = Path(__file__).parents[2] / "docs" / "kernels" / "resources.txt"
HEADER = """Resources of the compiled kernels, by ahead-of-time compilation: not a measurement of speed.
Regenerate: python -m simmp_fast.kernels.compile
Columns: kernel, width class, dtype, target | tiles, warps, stages | registers a thread, stack and shared bytes | matrix
instructions in the PTX ("unmatched": products of half precision by any other, none may be), and with wgmma the
hazards in the machine code, by kind ("hazards 0": none) | fingerprint of the source
"""


def load_kernels() -> None:
    """Import every module that registers kernels."""
    importlib.import_module("simmp_fast.kernels")


def version_line() -> str:
    """The line that says which compiler the figures belong to."""
    return f"Triton {triton.__version__}"


def line(case: Case, found: Resources) -> str:
    """One case as the report prints it."""
    tiles = " ".join(f"{k}={v}" for k, v in case.config.tiles.items())
    counts = {name: found.instructions[name] for name in MIX} | found.hazards
    mix = " ".join(f"{name} {count}" for name, count in counts.items() if count) or "none"
    if found.hazards and not any(found.hazards.values()):
        mix += " hazards 0"
    return (
        f"{case.label} | {tiles} warps {case.config.warps} stages {case.config.stages} | registers {found.registers} "
        f"stack {found.stack} shared {found.shared} | {mix} | {fingerprint(case)}"
    )


def parse(text: str) -> Resources:
    """What a line of the report says."""
    numbers = text.split("|")[2].split()
    mix = text.split("|")[3].split()
    said = {} if mix == ["none"] else {name: int(count) for name, count in zip(mix[::2], mix[1::2], strict=True)}
    counts = {name: said.get(name, 0) for name in MIX}
    looked = "hazards" in said or any(kind in said for kind in Kind)
    hazards = {kind.value: said.get(kind, 0) for kind in Kind} if looked else {}
    return Resources(int(numbers[1]), int(numbers[3]), int(numbers[5]), counts, hazards)


def read_report(path: Path = REPORT) -> tuple[str, dict[str, str]]:
    """The version line of the report, and its lines by label; empty where there is none."""
    if not path.exists():
        return "", {}
    lines = path.read_text(encoding="utf-8").splitlines()
    version = next((text for text in lines if text.startswith("Triton ")), "")
    return version, {text.split(" | ")[0]: text for text in lines if text.count(" | ") == 4}


def is_current(case: Case, text: str | None) -> bool:
    """Whether a line of the report was made from the code and configuration as they are, and searched for hazards."""
    if text is None or text.rsplit("| ", 1)[1] != fingerprint(case):
        return False
    found = parse(text)
    return bool(found.hazards) or not found.instructions["wgmma"]


def _worker(index: int) -> Resources:
    load_kernels()
    return compile_case(list(plan())[index])


def compile_cases(cases: Iterable[Case], jobs: int = 0) -> Iterator[tuple[Case, Resources]]:
    """Compile cases in parallel processes, yielding each as it is done; Triton's cache makes a second time quick.

    Args:
        cases: any cases of `plan`.
        jobs: processes; 0 takes one for each processor.
    """
    known = list(plan())
    wanted = [known.index(case) for case in cases]
    if not wanted:
        return
    jobs = min(jobs or os.cpu_count() or 1, len(wanted))
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(_worker, index): index for index in wanted}
        for future in as_completed(futures):
            case = known[futures[future]]
            error = future.exception()
            if error is not None:
                pool.shutdown(wait=False, cancel_futures=True)
                raise RuntimeError(f"{case.label}: does not compile") from error
            yield case, future.result()


def write_report(lines: dict[str, str], path: Path = REPORT) -> None:
    """Write the report in plan order, replacing the file at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ordered = [lines[case.label] for case in plan() if case.label in lines]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("\n".join([HEADER + version_line(), "", *ordered]) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns 1 where a configuration breaks a rule."""
    parser = argparse.ArgumentParser(prog="python -m simmp_fast.kernels.compile", description=__doc__.split("\n")[0])
    parser.add_argument("--all", action="store_true", help="compile every case, also those the report has")
    parser.add_argument("--only", metavar="WORDS", help="print the cases whose label contains all these words")
    parser.add_argument("--jobs", type=int, default=0, help="processes (default: one for each processor)")
    options = parser.parse_args(arguments)
    load_kernels()
    cases = list(plan())
    wrong: list[str] = []
    if options.only:
        words = options.only.split()
        for case, found in compile_cases([c for c in cases if all(w in c.label for w in words)], options.jobs):
            print(line(case, found), flush=True)
            if any(found.hazards.values()):
                print(*hazards_of(compiled_kernel(case)), sep="\n", flush=True)
            wrong += faults(case, found)
    else:
        version, kept = read_report()
        if options.all or version != version_line():
            kept = {}
        kept = {case.label: kept[case.label] for case in cases if is_current(case, kept.get(case.label))}
        for case, found in compile_cases([c for c in cases if c.label not in kept], options.jobs):
            kept[case.label] = line(case, found)
            print(kept[case.label], flush=True)
            write_report(kept)
        write_report(kept)
        wrong = [fault for case in cases for fault in faults(case, parse(kept[case.label]))]
    print("\n".join(wrong), file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
