"""What the options of ``simmp-fast bench`` do."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from simmp_fast.cli.common import choose_device
from simmp_fast.config import ConfigError

from . import cases, compare, report, run
from .backends import BASELINE, choose
from .measure import DIRECTIONS, Settings
from .rows import OK, PASSED, RESULTS, Row, append, read_jsonl

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def settings_of(arguments: argparse.Namespace, device: torch.device) -> Settings:
    """How to measure, from the options.

    Raises:
        ConfigError: an option that cannot be used.
    """
    default = ["bfloat16", "float32"] if device.type == "cuda" and not arguments.fast else ["float32"]
    unknown = [name for name in arguments.dtype or () if name not in DTYPES]
    if unknown:
        raise ConfigError(f"--dtype: got {unknown[0]!r}, expected some of {', '.join(DTYPES)}")
    if arguments.seconds is not None and arguments.seconds <= 0:
        raise ConfigError(f"--seconds: got {arguments.seconds}, expected more than 0")
    if arguments.batch is not None and arguments.batch < 1:
        raise ConfigError(f"--batch: got {arguments.batch}, expected at least 1")
    choose(arguments.backend or (), device, "context_attention", compiled=False)
    seconds = arguments.seconds if arguments.seconds is not None else 0.1 if arguments.fast else 2.0
    return Settings(
        device=device,
        dtypes=tuple(DTYPES[name] for name in arguments.dtype or default),
        backends=tuple(arguments.backend or ()),
        directions=tuple(arguments.direction or DIRECTIONS),
        seconds=seconds,
        fast=arguments.fast,
        baseline=not arguments.no_baseline,
    )


def execute(arguments: argparse.Namespace) -> None:
    """Measure and write, list the cases, compare or merge."""
    out = arguments.out or Path("bench-results")
    if arguments.compare:
        print(compare.compare(tuple(arguments.compare), _selection(arguments), _say))
        return
    if arguments.merge:
        _write(out, merged(arguments.merge))
        return
    device = choose_device(arguments.device)
    shapes = [cases.parse_shape(text) for text in arguments.shape or ()]
    selected = cases.select(
        device.type, arguments.operator, arguments.group or (), shapes, arguments.batch, arguments.fast, arguments.all
    )
    if arguments.list:
        for case in selected:
            print(case.name)
        return
    settings = settings_of(arguments, device)
    rows: list[Row] = []

    def keep(row: Row) -> None:
        """Into the result file at once: a run that is cut loses nothing."""
        if not rows:
            (out / RESULTS).unlink(missing_ok=True)  # of an earlier run
        rows.append(row)
        append(out / RESULTS, row)

    try:
        with _bar(len(selected)) as progress:
            run.run(selected, settings, progress, keep)
    except KeyboardInterrupt:
        if rows:
            run.save(out, rows)
        raise
    _write(out, rows)


def _write(out: Path, rows: Sequence[Row]) -> None:
    """Save, and say what and where."""
    written = run.save(out, rows)
    print(report.summary(rows))
    for path in written:
        print(path)


def merged(folders: Sequence[Path]) -> list[Row]:
    """The rows of several results; what more than one has is taken from the first, such as the baseline.

    A row of a run without the baseline gets its speed-up from the baseline of another one: the ratio of the medians,
    without percentiles, since the two took no turns.

    Raises:
        ConfigError: a folder without results, or results of different machines or versions.
    """
    found: dict[tuple[str, ...], Row] = {}
    for folder in folders:
        for row in read_jsonl(folder):
            first = next(iter(found.values()), row)
            for key in ("cpu", "gpu", "torch", "triton", "commit"):
                mine, its = row.environment.get(key), first.environment.get(key)
                if mine != its:
                    raise ConfigError(f"--merge: got {key} {mine!r} in {folder}, expected {its!r} as in {folders[0]}")
            found.setdefault(row.identity, row)
    rows = list(found.values())
    usual = {_without_backend(row): row for row in rows if row.backend == BASELINE and _is_right(row)}
    for row in rows:
        baseline = usual.get(_without_backend(row))
        if baseline is not None and row.speedup is None and row.backend != BASELINE and _is_right(row):
            row.speedup = (baseline.median_ms or 0) / (row.median_ms or 1)
    return rows


def _without_backend(row: Row) -> tuple[str, ...]:
    return (*row.case_key, row.dtype, row.label)


def _is_right(row: Row) -> bool:
    """Whether it has a time, and passed parity."""
    return row.status == OK and row.parity == PASSED and bool(row.median_ms)


def _selection(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options that say what is measured, as `measure_selection` takes them in another process."""
    kept = ("operator", "backend", "shape", "dtype", "group", "direction", "batch", "device", "seconds", "fast", "all")
    kept = (*kept, "no_baseline")
    return {name: getattr(arguments, name) for name in kept}


def measure_selection(text: str, out: str) -> None:
    """Measure a selection, given as JSON, into the folder `out`: how another revision of the package is measured."""
    execute(argparse.Namespace(**json.loads(text), out=Path(out), list=False, compare=None, merge=None))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _bar(total: int) -> Iterator[run.Progress]:
    """A progress bar on a terminal; elsewhere a line a case."""
    if not sys.stderr.isatty():
        counter = itertools.count(1)
        yield lambda name: _say(f"[{next(counter)}/{total}] {name}")
        return
    from tqdm import tqdm

    begun = itertools.count()
    with tqdm(total=total, unit="case", leave=False, dynamic_ncols=True) as bar:

        def advance(name: str) -> None:
            bar.n = next(begun)
            bar.set_description(name)

        yield advance
