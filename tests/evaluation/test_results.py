"""Result files: what is never replaced by chance, tables and summaries that belong together, and cells of a CSV."""

from __future__ import annotations

import csv
import errno
import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from stand_ins import LevelModel

from simmp_fast import files
from simmp_fast.data.cache import Cache
from simmp_fast.data.errors import DataError
from simmp_fast.evaluation.evaluate import evaluate
from simmp_fast.evaluation.report import Evaluation, check_folder, check_results


@pytest.fixture
def result(model: LevelModel, cache: Cache) -> Evaluation:
    return evaluate(model, cache, "test")


def test_results_of_other_data_are_replaced_only_if_asked(result: Evaluation, tmp_path: Path) -> None:
    table, summary = result.save(tmp_path / "out")
    before = table.read_bytes()
    result.save(tmp_path / "out")  # the same data: an evaluation again
    for other in (replace(result, cache="f" * 64), replace(result, dataset="other")):
        with pytest.raises(DataError, match=r"test_published\.json: got results of 'levels' .*overwrite=True"):
            other.save(tmp_path / "out")
    assert table.read_bytes() == before
    summary.unlink()
    with pytest.raises(DataError, match="got results of unknown data"):
        result.save(tmp_path / "out")
    replace(result, dataset="other", rows=()).save(tmp_path / "out", overwrite=True)
    assert json.loads(summary.read_text())["dataset"] == "other"
    assert len(table.read_text().splitlines()) == 1


def test_the_summary_has_the_checksum_of_its_table(result: Evaluation, tmp_path: Path) -> None:
    table, summary = result.save(tmp_path / "out")
    found = json.loads(summary.read_text())["table"]
    assert found == {"file": "test_published.csv", "sha256": hashlib.sha256(table.read_bytes()).hexdigest()}


def test_a_table_that_does_not_belong_to_its_summary(
    result: Evaluation, cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    result.save(out)

    rename = os.replace

    def killed(source: Path, target: Path) -> None:
        if target.suffix == ".json":
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        replace(result, rows=result.rows[:1]).save(out)
    monkeypatch.undo()
    message = r"test_published\.csv: does not belong to test_published\.json, whose checksum of it differs"
    with pytest.raises(DataError, match=message):
        check_results(out, "test", "published", cache)
    with pytest.raises(DataError, match=message):
        result.save(out)
    result.save(out, overwrite=True)
    assert check_results(out, "test", "published", cache) == {}
    (out / "test_published.csv").unlink()
    assert check_results(out, "test", "published", cache) == {}


@pytest.mark.parametrize("syncs", [0, 1])
def test_a_disk_that_fills_leaves_both_old_files(
    result: Evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, syncs: int
) -> None:
    result.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    count, sync = iter(range(syncs)), os.fsync

    def full(handle: int) -> None:
        if next(count, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match="the disk is full"):
        replace(result, rows=result.rows[:1]).save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r"])
def test_names_that_a_spreadsheet_would_compute(result: Evaluation, tmp_path: Path, start: str) -> None:
    name = f'{start}HYPERLINK("http://x";"a")'
    row = replace(result.rows[0], case=name, name=name)
    table, summary = replace(result, rows=(row, result.rows[1])).save(tmp_path / "out")
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert (rows[0]["case"], rows[0]["class"], rows[1]["case"]) == (f"'{name}", f"'{name}", "first")
    assert float(rows[0]["dice"]) == row.score.dice
    assert name in json.loads(summary.read_text())["per_case"]


def test_leftovers_of_killed_evaluations_are_removed(
    result: Evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    out = tmp_path / "out"
    out.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: process.pid)
        files.temporary_name(out / "a.csv").touch()
    files._live.clear()
    result.save(out)
    assert sorted(os.listdir(out)) == ["test_published.csv", "test_published.json"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x" * 300, "File name too long"),
        ("/".join(["y" * 200] * 21), "File name too long"),
        ("a\0b", "NUL"),
        ("nowhere", "got a link that leads nowhere, expected a folder"),
        ("nowhere/deep", "nowhere: got a link that leads nowhere"),
        ("loop", "loop: cannot be written .Too many levels of symbolic links"),
        ("file", "file: got a file, expected a folder"),
        ("file/deep", "file: got a file, expected a folder"),
    ],
)
def test_folders_that_cannot_be(result: Evaluation, cache: Cache, tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "nowhere").symlink_to(tmp_path / "absent")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").touch()
    before = sorted(os.listdir(tmp_path))
    for attempt in (check_folder, result.save, lambda folder: check_results(folder, "test", "strict", cache)):
        with pytest.raises(DataError, match=message):
            attempt(tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == before


def test_read_only_folders(result: Evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # the superuser may write everywhere
    with pytest.raises(DataError, match="got a folder without permission to write"):
        result.save(tmp_path / "out")


def test_a_folder_in_place_of_a_result(result: Evaluation, tmp_path: Path) -> None:
    (tmp_path / "out" / "test_published.csv").mkdir(parents=True)
    with pytest.raises(DataError, match="got results of unknown data"):
        result.save(tmp_path / "out")
    with pytest.raises(DataError, match=r"out: cannot be written \(Is a directory\)"):
        result.save(tmp_path / "out", overwrite=True)
    assert os.listdir(tmp_path / "out") == ["test_published.csv"]
