"""Result files: a row is there at once, a run that was cut can be read, and says which commit it measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import command, environment, run
from bench.rows import FAILED, PASSED, RESULTS, Row, append, read_jsonl, write_jsonl
from simmp_fast.cli import main
from simmp_fast.config import ConfigError


def row(backend: str, **values: object) -> Row:
    given = {"parity": PASSED, "median_ms": 10.0, **values}
    return Row("split_threshold", "asked", "", 1, backend, "forward", {"N": 30}, "float32", **given)


def test_a_half_written_line_is_skipped_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "out" / RESULTS
    append(path, row("portable"))
    append(path, row("triton"))
    whole = path.read_text()
    path.write_text(whole + json.dumps({"operator": "split"})[:-5])
    assert [r.backend for r in read_jsonl(path)] == ["portable", "triton"]
    append(path, row("sdpa"))
    assert path.read_text().startswith(whole)
    assert [r.backend for r in read_jsonl(path)] == ["portable", "triton", "sdpa"]


def test_what_was_written_last_counts(tmp_path: Path) -> None:
    path = tmp_path / RESULTS
    for made in (row("portable", median_ms=1.0), row("triton"), row("portable", median_ms=2.0)):
        append(path, made)
    assert [(r.backend, r.median_ms) for r in read_jsonl(path)] == [("portable", 2.0), ("triton", 10.0)]


@pytest.mark.parametrize("text", ["", "no result", '{"operator": 1', '{"a": 1}\n{"b"'])
def test_no_result(text: str, tmp_path: Path) -> None:
    path = tmp_path / RESULTS
    path.write_text(text)
    with pytest.raises(ConfigError, match="not the result of a benchmark"):
        read_jsonl(path)


def test_a_cut_run_leaves_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of an earlier run are gone, those of this one are there before it ends."""
    write_jsonl(tmp_path / RESULTS, [row("sdpa")])
    seen: list[list[str]] = []

    def killed(cases: object, settings: object, progress: object, keep: object) -> None:
        keep(row("portable"))
        keep(row("triton"))
        seen.append([r.backend for r in read_jsonl(tmp_path)])
        raise SystemExit(9)

    monkeypatch.setattr(run, "run", killed)
    with pytest.raises(SystemExit):
        main(["bench", "split_threshold", "--device", "cpu", "--out", str(tmp_path)])
    assert seen == [["portable", "triton"]]
    assert {path.name for path in tmp_path.iterdir()} == {RESULTS}


def test_speedups_of_a_run_without_a_baseline(tmp_path: Path) -> None:
    results = {
        "baseline": [row("reference", median_ms=30.0)],
        "kernels": [
            row("triton"),
            row("portable", parity="failed"),
            row("sdpa", status=FAILED, median_ms=None),
            row("reference-compiled", speedup=2.0, speedup_p20=1.9, speedup_p80=2.1),
        ],
    }
    for name, rows in results.items():
        write_jsonl(tmp_path / name / RESULTS, rows)
    merged = {r.backend: r for r in command.merged([tmp_path / "kernels", tmp_path / "baseline"])}
    assert merged["triton"].speedup == 3.0
    assert merged["triton"].speedup_p20 is None
    assert [merged[name].speedup for name in ("portable", "sdpa", "reference")] == [None, None, None]
    assert merged["reference-compiled"].speedup == 2.0, "a ratio round by round is the better one"
    other = row("reference", median_ms=30.0)
    other.dtype = "bfloat16"
    write_jsonl(tmp_path / "baseline" / RESULTS, [other])
    merged = {r.backend: r for r in command.merged([tmp_path / "kernels", tmp_path / "baseline"])}
    assert merged["triton"].speedup is None


def test_the_commit_of_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    monkeypatch.delenv("SIMMP_FAST_COMMIT", raising=False)
    assert environment.describe(torch.device("cpu"))["commit"] == "unknown"
    monkeypatch.setenv("SIMMP_FAST_COMMIT", "0123456789ab")
    assert environment.describe(torch.device("cpu"))["commit"] == "0123456789ab"
