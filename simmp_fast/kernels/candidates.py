"""Candidates that were compiled and judged beforehand: a file of them, so that a device only has to time them.

A file has a JSON object a line, written as soon as its candidate is compiled: a cut run goes on where it stopped. The
machine code itself lies in Triton's cache, which can travel with the file.
"""

from __future__ import annotations

import functools
import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from .aot import Resources, fingerprint
from .apart import one_by_one
from .configs import VERSION, Config, rows
from .measure import case_of, compiled_each
from .search import Descent, Subject, Target, key

Answers = Iterable[tuple[Config, tuple[Config | str, Resources] | str]]


def compiled_apart(subject: Subject, configs: Sequence[Config], target: Target, end: float) -> Answers:
    """`compiled_each` in a process of its own."""
    return one_by_one(compiled_each, configs, subject, target, end=end)


@functools.cache
def _origin(subject: Subject, target: Target) -> dict[str, Any]:
    """What a candidate's machine code follows from, beside its configuration."""
    pinned = next(r for r in rows(subject.kernel) if (r.dtype, r.width) == (subject.dtype, subject.width))
    capability = f"{target.capability[0]}.{target.capability[1]}"
    code = fingerprint(case_of(pinned, subject.dtype, target))
    return {**vars(subject), "capability": capability, "triton": VERSION, "code": code}


def _line(subject: Subject, target: Target, config: Config, answer: tuple[Config | str, Resources] | str) -> str:
    found, needs = (answer, None) if isinstance(answer, str) else answer
    line = {**_origin(subject, target), "tiles": config.tiles, "warps": config.warps, "stages": config.stages}
    if needs is not None:
        line |= {"registers": needs.registers, "stack": needs.stack, "shared": needs.shared}
    return json.dumps(line | ({"refused": found} if isinstance(found, str) else {}))


def _read(path: Path, subjects: Sequence[Subject], target: Target) -> Iterator[tuple[Subject, dict[str, Any]]]:
    """The lines of a file that are about these rows, this device, and this code and compiler."""
    known = {(s.kernel, s.dtype, s.width): s for s in subjects}
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:  # cut in the midst of a line
            continue
        subject = known.get((line["kernel"], line["dtype"], line["width"]))
        if subject is not None and line.items() >= _origin(subject, target).items():
            yield subject, line


def _config(start: Config, line: dict[str, Any]) -> Config:
    needs = {"shared": max(line.get("shared", 0), 1024), "stack": line.get("stack", 0)}
    return replace(start, tiles=line["tiles"], warps=line["warps"], stages=line["stages"], **needs)


def precompile(
    subjects: Sequence[Subject],
    target: Target,
    path: Path,
    *,
    jobs: int = 1,
    seconds: float = math.inf,
    compile_each: Callable[[Subject, Sequence[Config], Target, float], Answers] = compiled_apart,
) -> tuple[int, int]:
    """Compile the row in use and the candidates of the first round of every row, judge them, and write them to a file.

    Args:
        subjects: of `search.plan`.
        target: the device.
        path: the file; what it holds already is not compiled again.
        jobs: rows at the same time.
        seconds: all stops after them.
        compile_each: what is done with the candidates of a row.

    Returns:
        how many candidates were written, and how many of them can be used.
    """
    end, lock, counts = time.monotonic() + seconds, threading.Lock(), [0, 0]
    path.touch()
    done: dict[Subject, set[object]] = {subject: set() for subject in subjects}
    for subject, line in _read(path, subjects, target):
        done[subject].add(key(_config(subject.row(target), line)))
    if path.stat().st_size and not path.read_bytes().endswith(b"\n"):
        with path.open("a", encoding="utf-8") as file:
            file.write("\n")

    def one(subject: Subject) -> None:
        start = subject.row(target)
        waiting = [c for c in (start, *Descent(start).candidates()) if key(c) not in done[subject]]
        if not waiting:
            return
        for config, answer in compile_each(subject, waiting, target, end):
            text = _line(subject, target, config, answer)
            usable = "refused" not in json.loads(text)
            with lock, path.open("a", encoding="utf-8") as file:
                file.write(text + "\n")
                file.flush()
                os.fsync(file.fileno())
                counts[0] += 1
                counts[1] += usable

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, subjects))
    return counts[0], counts[1]


def candidates_of(path: Path, subjects: Sequence[Subject], target: Target) -> dict[Subject, list[Config]]:
    """The usable candidates of a file by row, the row in use left out; a row without any is missing."""
    found: dict[Subject, dict[object, Config]] = {}
    for subject, line in _read(path, subjects, target):
        start = subject.row(target)
        config = _config(start, line)
        if "refused" not in line and key(config) != key(start):
            found.setdefault(subject, {})[key(config)] = config
    return {subject: list(configs.values()) for subject, configs in found.items()}
