"""The fast mode keeps the benchmark alive: structure and parity, never a time."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from bench import cases
from bench.cases import PARTS
from bench.formulas import FORMULAS
from bench.rows import OK, PASSED, Row, read_jsonl


def test_every_operator_is_measured_and_right(fast_rows: list[Row]) -> None:
    wrong = [f"{r.operator} {r.backend}: {r.status} {r.parity} {r.message}" for r in fast_rows if r.status != OK]
    wrong += [f"{r.operator} {r.backend}: {r.message}" for r in fast_rows if r.parity == "failed"]
    assert not wrong
    assert {row.operator.partition(".")[0] for row in fast_rows} == set(cases.OPERATORS)
    for name in FORMULAS:
        assert {row.backend for row in fast_rows if row.operator == name} >= {"reference", "portable"}


def test_rows_are_complete(fast_rows: list[Row]) -> None:
    for row in fast_rows:
        assert row.p20_ms is not None
        assert row.median_ms is not None
        assert row.p80_ms is not None
        assert 0 <= row.p20_ms <= row.median_ms <= row.p80_ms
        assert len(row.samples_ms) >= 1
        assert {"cpu", "cores", "torch", "triton", "commit", "gpu", "driver"} <= set(row.environment)
        if row.operator in FORMULAS:
            assert row.bytes
            assert row.flops
            assert row.peak_bytes
            assert row.roofline_share
            assert row.bound in ("memory", "compute")
            assert row.parity == PASSED


def test_speedups_only_beside_parity(fast_rows: list[Row]) -> None:
    for row in fast_rows:
        assert (row.speedup is None) == (row.speedup_p20 is None)
        if row.speedup is not None:
            assert row.parity == PASSED
            assert row.backend != "reference"


def test_no_launches_without_a_gpu(fast_rows: list[Row]) -> None:
    step = [row for row in fast_rows if row.operator == "training_step"]
    assert step
    for row in step:
        assert row.launches is None
        assert row.syncs is None
        assert "CUDA" in row.message


def test_parts_add_up_to_the_step(fast_rows: list[Row]) -> None:
    for backend in ("reference", "portable"):
        mine = {r.operator: r for r in fast_rows if r.backend == backend and r.operator.startswith("training_step")}
        assert set(mine) == {"training_step", "training_step.without_backbone", *(f"training_step.{p}" for p in PARTS)}
        for index, total in enumerate(mine["training_step"].samples_ms):
            parts = sum(mine[f"training_step.{part}"].samples_ms[index] for part in PARTS)
            assert parts == pytest.approx(total, abs=1e-4)
        for part in ("backbone", "dmwla", "dsgim", "decoder", "loss", "memory_update", "optimiser"):
            assert min(mine[f"training_step.{part}"].samples_ms) > 0, part


def test_files_hold_the_same_rows(fast_rows: list[Row], fast_results: Path) -> None:
    assert read_jsonl(fast_results) == fast_rows
    lines = (fast_results / "results.jsonl").read_text().splitlines()
    assert all(json.loads(line)["schema"] == 1 for line in lines)
    with open(fast_results / "results.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["operator"] for row in table] == [row.operator for row in fast_rows]
    assert "environment.commit" in table[0]


def test_no_trace_of_the_machine(fast_results: Path) -> None:
    import platform

    text = (fast_results / "results.jsonl").read_text() + (fast_results / "report.md").read_text()
    assert str(Path(__file__).resolve().parents[2]) not in text
    assert platform.node() not in text or len(platform.node()) < 4


def test_report_and_pictures(fast_results: Path) -> None:
    text = (fast_results / "report.md").read_text()
    assert "Every case ran, and every parity check passed." in text
    assert "times mean nothing" in text
    for name in ("step_by_part.png", "roofline.png"):
        assert f"({name})" in text
        assert (fast_results / name).read_bytes().startswith(b"\x89PNG")
