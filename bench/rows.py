"""One measurement is one row; a run is a JSON Lines file of rows and the same rows as CSV."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from simmp_fast.config import ConfigError

SCHEMA = 1
OK, FAILED, OUT_OF_MEMORY = "ok", "failed", "out of memory"
PASSED, PARITY_FAILED, NOT_CHECKED = "passed", "failed", "not checked"
RESULTS = "results.jsonl"


@dataclass
class Row:
    """What was measured for one (operator, backend, direction, shape, dtype).

    Attributes:
        operator: name in the registry; a part of the training step is ``training_step.<part>``.
        group: why the case is there: "operators", "blocks", "dsgim", "loss", "sweep N", "step", ...
        label: where the shape comes from, in words.
        uses: how often the network uses this shape in one forward pass.
        backend: who was measured.
        direction: "forward", "backward" or "both".
        shape: sizes by name.
        dtype: "float32", "bfloat16", "float16", or "" where there is none.
        status: "ok", "failed" or "out of memory".
        message: what went wrong, or why a value is missing.
        median_ms, p20_ms, p80_ms: time, None unless `status` is "ok".
        samples_ms: the single rounds, at most 100.
        peak_bytes: memory allocated at the peak, above what the inputs take.
        bytes, flops: least traffic and operations by formula (bench/formulas.py).
        roofline_ms: time that the measured ceilings allow for them.
        roofline_share: `roofline_ms / median_ms`.
        bound: which ceiling it is, "memory" or "compute".
        parity: "passed", "failed" or "not checked".
        speedup, speedup_p20, speedup_p80: ratios of the reference's time to this one, round by round; only where
            parity passed. Without percentiles it is the ratio of the medians of two runs (`command.merged`).
        rate: items a second, where a case has items.
        launches, syncs: kernels started and waits of the host for the device in one call; None off CUDA.
        environment: machine, versions and commit.
    """

    operator: str
    group: str
    label: str
    uses: int
    backend: str
    direction: str
    shape: dict[str, int]
    dtype: str
    status: str = OK
    message: str = ""
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    samples_ms: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    bytes: int | None = None
    flops: int | None = None
    roofline_ms: float | None = None
    roofline_share: float | None = None
    bound: str | None = None
    parity: str = NOT_CHECKED
    speedup: float | None = None
    speedup_p20: float | None = None
    speedup_p80: float | None = None
    rate: float | None = None
    launches: int | None = None
    syncs: int | None = None
    environment: dict[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA

    @property
    def key(self) -> tuple[str, str, str, str, str, str]:
        """What identifies the measurement; two results are compared where it is equal."""
        return (self.group, self.operator, self.backend, self.direction, shape_text(self.shape), self.dtype)

    @property
    def identity(self) -> tuple[str, ...]:
        """`key` and where the shape comes from: two blocks of one shape are two measurements."""
        return (*self.key, self.label)

    @property
    def case_key(self) -> tuple[str, str, str, str]:
        """What rows of different backends and dtypes share."""
        return (self.group, self.operator, self.direction, shape_text(self.shape))


def shape_text(shape: dict[str, int]) -> str:
    """``B=2 N=3136 D=256``."""
    return " ".join(f"{name}={size}" for name, size in shape.items())


def write(path: Path, content: str | bytes) -> None:
    """Write a file in one step: a reader sees the old one or the whole new one.

    `simmp_fast.data` has the same for data sets, but imports what reads images: a GPU machine that only measures
    operators may not have it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_jsonl(path: Path, rows: Iterable[Row]) -> None:
    """Write rows as JSON Lines, in one step."""
    write(path, "".join(json.dumps(asdict(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows))


def append(path: Path, row: Row) -> None:
    """Write a row at the end of a result file, at once: what ends the process later takes nothing back.

    A line that an earlier process left half written is dropped.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(asdict(row), ensure_ascii=False, allow_nan=False) + "\n"
    with open(path, "a+b") as file:
        file.seek(0)
        held = file.read()
        if not held.endswith(b"\n"):
            file.truncate(held.rfind(b"\n") + 1)
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Write rows as CSV, in one step; the environment becomes columns ``environment.*``, the rounds are left out."""
    flat = []
    for row in rows:
        values = asdict(row)
        del values["samples_ms"]
        environment = values.pop("environment")
        values["shape"] = shape_text(values["shape"])
        flat.append({**values, **{f"environment.{key}": value for key, value in environment.items()}})
    columns = list(dict.fromkeys(column for values in flat for column in values))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    write(path, buffer.getvalue())


def read_jsonl(path: Path) -> list[Row]:
    """The rows of a result file, or of the folder that holds it.

    A run that was cut may leave its last line half written: it is skipped. A measurement that was written twice counts
    as it was written last.

    Raises:
        ConfigError: no such file, or no benchmark result.
    """
    path = path / RESULTS if path.is_dir() else path
    known = {f.name for f in fields(Row)}
    try:
        whole, newline, _ = path.read_bytes().rpartition(b"\n")
        lines = [json.loads(line) for line in whole.splitlines() if line]
        rows = [Row(**{key: value for key, value in line.items() if key in known}) for line in lines]
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}), expected a benchmark's {RESULTS}") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: not the result of a benchmark ({error})") from None
    if not newline:
        raise ConfigError(f"{path}: not the result of a benchmark (no line in it is whole)")
    newer = [row.schema for row in rows if row.schema != SCHEMA]
    if newer:
        raise ConfigError(f"{path}: got results of schema {newer[0]}, expected {SCHEMA}")
    return list({row.identity: row for row in rows}.values())
