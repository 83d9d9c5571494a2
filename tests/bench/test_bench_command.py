"""The command line of the benchmark."""

from __future__ import annotations

from pathlib import Path

import pytest

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
