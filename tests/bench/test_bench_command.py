"""The command line of the benchmark."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.rows import read_jsonl, write_jsonl
from simmp_fast.cli import bench as command
from simmp_fast.cli import main


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "powerset_loss", "--list", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "loss/powerset_loss[B=1,classes=9,grid=56,side=256]" in printed
    assert "sweep B/powerset_loss" in printed


def test_run_of_one_operator(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    selection = ["split_threshold", "--shape", "N=30,C=8", "--backend", "portable", "--seconds", "0.01"]
    assert main(["bench", *selection, "--device", "cpu", "--out", str(tmp_path / "out")]) == 0
    assert "rows, 0 without a time, 0 with failed parity" in capsys.readouterr().out
    assert {"results.jsonl", "results.csv", "report.md"} <= {path.name for path in (tmp_path / "out").iterdir()}


def test_results_merged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What two runs have in common is there once; another commit's rows are refused."""
    for backend in ("portable", "reference-compiled"):
        selection = ["split_threshold", "--shape", "N=30,C=8", "--backend", backend, "--seconds", "0.01"]
        assert main(["bench", *selection, "--device", "cpu", "--out", str(tmp_path / backend)]) == 0
    folders = [str(tmp_path / name) for name in ("portable", "reference-compiled")]
    assert main(["bench", "--merge", *folders, "--out", str(tmp_path / "both")]) == 0
    rows = read_jsonl(tmp_path / "both")
    assert [row.backend for row in rows] == ["reference", "portable", "reference-compiled"]
    assert "reference-compiled" in (tmp_path / "both" / "report.md").read_text()

    for row in rows:
        row.environment = {**row.environment, "commit": "another"}
    (tmp_path / "other").mkdir()
    write_jsonl(tmp_path / "other" / "results.jsonl", rows)
    capsys.readouterr()
    assert main(["bench", "--merge", folders[0], str(tmp_path / "other"), "--out", str(tmp_path / "none")]) == 2
    assert "--merge: got commit 'another' in" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("attention", "operator: got 'attention'"),
        ("context_attention --dtype float8", "--dtype: got 'float8'"),
        ("context_attention --backend triton --device cpu", "'triton' cannot run here"),
        ("--seconds 0", "--seconds: got 0.0"),
        ("--batch 0", "--batch: got 0"),
    ],
)
def test_bad_options(options: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *options.split(), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert not (tmp_path / "out").exists()


def test_without_a_clone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(command, "CLONE", tmp_path)
    assert main(["bench", "--fast"]) == 2
    assert "needs a clone of the repository" in capsys.readouterr().err
