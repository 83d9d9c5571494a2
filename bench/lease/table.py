"""The short table at the end of a call: what was right, how fast the step is, what it spends its time on."""

from __future__ import annotations

import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..cases import OPERATORS, STEP
from ..nullgpu import NAME
from .predicted import PARTS, PEAK, REST
from .predicted import STEP as STEPS
from .record import read

LARGEST = 20
LONGEST_NAME = 60
MOST_WRONG, LONGEST_MESSAGE = 12, 110
PROFILE = "profile-"
WORD = re.compile(r"[a-z_0-9]+")


def summary(out: Path, stages: Path | None = None) -> str:
    """All tables as Markdown.

    Args:
        out: the folder that came home.
        stages: the stages' own folders, where they are at hand; otherwise they are read from the bundle.
    """
    lines = list(read(out / "lease.jsonl"))
    # A row is written again when more of it is known: the last one has all.
    names = ("operator", "backend", "direction", "dtype", "shape")
    known = {str([row.get(name) for name in names]): row for row in read(out / "results.jsonl") if "operator" in row}
    rows = [row for row in known.values() if row["operator"] == STEP]
    profiles = dict(_profiles(out, stages))
    parts = [
        _devices(lines), _stages(lines), _parity(list(read(out / "tests.jsonl"))), _wrong(list(known.values())),
        _steps(rows), _kernels(profiles), _predictions(rows, profiles),
    ]  # fmt: skip
    return "\n\n".join(part for part in parts if part)


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; empty where it has no row."""
    if not rows:
        return ""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


def _devices(lines: Sequence[dict[str, Any]]) -> str:
    found = [line for line in lines if line.get("event") == "device"]
    if not found:
        return ""
    last = found[-1]
    versions = ", ".join(f"{name} {last.get(name)}" for name in ("torch", "triton", "cuda", "driver", "commit"))
    computed = "" if NAME not in str(last.get("gpu")) else ". **Nothing was computed: no line below is a result.**"
    return f"{last.get('gpu')} (sm_{str(last.get('capability')).replace('.', '')}): {versions}{computed}"


def _stages(lines: Sequence[dict[str, Any]]) -> str:
    """How each stage ended; one without an end was cut off with the whole call."""
    found: dict[str, list[Any]] = {}
    for line in lines:
        name = line.get("stage")
        if name is None:
            continue
        if line.get("event") == "started":
            found[name] = [line.get("call"), name, "no end", "", ""]
        else:
            found[name] = [line.get("call"), name, line.get("status"), line.get("seconds"), line.get("kernels", "")]
    return _table(("call", "stage", "ended", "seconds", "kernels more in the cache"), list(found.values()))


def subject(node: str) -> str:
    """The operator that a test is about, by its name or its parameters; else the name of the test."""
    path, _, name = node.partition("::")
    words = set(WORD.findall(name.partition("[")[2]))
    for operator in sorted(OPERATORS, key=len, reverse=True):
        if operator in words:
            return operator
    return f"{Path(path).stem}: {name.partition('[')[0]}"


def _parity(lines: Sequence[dict[str, Any]]) -> str:
    """Tests by operator; of a test that was run more than once the last line counts."""
    last: dict[str, str] = {}
    for line in lines:
        if "test" in line:
            last[line["test"]] = line.get("outcome", "")
    counts: dict[str, Counter[str]] = {}
    for node, outcome in last.items():
        counts.setdefault(subject(node), Counter())[outcome] += 1
    known = ("passed", "failed", "skipped")
    rows = [
        (name, *(count[outcome] for outcome in known), sum(n for what, n in count.items() if what not in known))
        for name, count in sorted(counts.items(), key=lambda item: (-item[1]["failed"], item[0]))
    ]
    return _table(("tests of", *known, "no end"), rows)


def _wrong(rows: Sequence[dict[str, Any]]) -> str:
    """Measurements that failed, or whose results were not right."""
    found = []
    for row in rows:
        if row["status"] == "ok" and row["parity"] != "failed":
            continue
        shape = " ".join(f"{name}={size}" for name, size in row["shape"].items())
        what = row["status"] if row["status"] != "ok" else "parity failed"
        message = f"{what}: {row['message']}"[:LONGEST_MESSAGE]
        found.append((row["operator"], row["backend"], row["dtype"], shape, message))
    more = [(f"and {len(found) - MOST_WRONG} more", "", "", "", "")] if len(found) > MOST_WRONG else []
    return _table(("not right", "backend", "dtype", "shape", ""), found[:MOST_WRONG] + more)


def _number(value: Any, digits: int, scale: float = 1.0) -> str:
    return "" if value is None else f"{value / scale:.{digits}f}"


def _steps(rows: Sequence[dict[str, Any]]) -> str:
    found = [
        (
            row["backend"], row["dtype"], _number(row.get("median_ms"), 2), _number(row.get("rate"), 0),
            _number(row.get("peak_bytes"), 2, 2**30), row.get("launches") or "",
            row["status"] if row["status"] != "ok" else f"parity {row['parity']}",
        )
        for row in rows
    ]  # fmt: skip
    head = ("step", "dtype", "ms", "images/s", "peak GiB", "launches", "")
    return _table(head, found)


def _profiles(out: Path, stages: Path | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Form and profile, from the stages' folders or the bundle."""
    texts: dict[str, bytes] = {}
    if stages is not None and stages.is_dir():
        texts = {path.name: path.read_bytes() for path in sorted(stages.rglob(f"{PROFILE}*.json"))}
    elif (out / "bundle.tar.gz").is_file():
        with tarfile.open(out / "bundle.tar.gz") as bundle:
            for member in bundle:
                name = Path(member.name)
                if name.match(f"{PROFILE}*.json") and (file := bundle.extractfile(member)) is not None:
                    texts[name.name] = file.read()
    for name, text in texts.items():
        try:
            found = json.loads(text)
        except ValueError:
            continue
        yield Path(name).stem.removeprefix(PROFILE), found


def _kernels(profiles: dict[str, dict[str, Any]]) -> str:
    """The largest kernels of the form that was profiled last."""
    if not profiles:
        return ""
    form, found = list(profiles.items())[-1]
    rows = [
        (
            f"`{kernel['name'][:LONGEST_NAME]}`",
            kernel.get("blocks") or "",
            f"{kernel['calls']:g}",
            f"{kernel['ms']:.3f}",
        )
        for kernel in found["kernels"][:LARGEST]
    ]
    return _table((f"largest kernels of {form}", "blocks", "calls a step", "ms a step"), rows)


def _predictions(rows: Sequence[dict[str, Any]], profiles: dict[str, dict[str, Any]]) -> str:
    """Measured beside predicted; only in the dtype that the predictions are for."""
    found = []
    for row in rows:
        peak = PEAK.get((row["backend"], row["dtype"]))
        if peak is not None and row.get("peak_bytes"):
            found.append((f"peak GiB, {row['backend']} {row['dtype']}", f"{peak:g}", row["peak_bytes"] / 2**30))
        expected = STEPS.get(row["backend"]) if row["dtype"] == "bfloat16" else None
        if expected is not None and row.get("median_ms") is not None:
            found.append((f"step, {row['backend']}", f"{expected[1]:g}", row["median_ms"]))
    for form, profile in profiles.items():
        backend = form.removesuffix("-bfloat16")
        if backend not in REST:
            continue
        left = sum(kernel["ms"] for kernel in profile["kernels"])
        for part in PARTS:
            took = sum(k["ms"] for k in profile["kernels"] if k["name"].startswith(part.kernels))
            left -= took
            found.append((f"{part.name}, {backend}", f"{part.ms:g}", took))
        found.append((f"all else, {backend}", f"{REST[backend]:g}", left))
    table = [(name, ms, f"{took:.2f}", f"{took / float(ms):.2f}") for name, ms, took in found]
    return _table(("predicted beside measured; ms a step unless said", "predicted", "measured", "ratio"), table)
