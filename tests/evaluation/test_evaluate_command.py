"""``simmp-fast evaluate`` from a cache to its files: damage is found first, and no result is lost."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from stand_ins import LevelModel

from simmp_fast.cli import main
from simmp_fast.data.cache import Cache


@pytest.fixture
def command(cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Its words, with the stand-in for the network of a run folder."""
    run = tmp_path / "run"
    run.mkdir()
    weights = run / "best.safetensors"
    weights.write_bytes(b"weights")
    monkeypatch.setattr("simmp_fast.cli.evaluate.check_data", lambda *_: None)
    monkeypatch.setattr("simmp_fast.cli.evaluate.load_network", lambda *_: (LevelModel(), weights))
    return ["evaluate", str(run), "--data", str(cache.folder), "--device", "cpu"]


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def broken(*_: object) -> None:
    raise OSError(errno.EIO, "Input/output error")


@pytest.mark.parametrize("name", ["images.npy", "labels.npy", "native_labels.bin"])
def test_a_damaged_cache_is_not_measured(
    command: list[str], cache: Cache, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    content = bytearray((cache.folder / name).read_bytes())
    content[-1] ^= 1
    (cache.folder / name).write_bytes(content)
    assert main(command) == 2
    error = capsys.readouterr().err
    assert f"{cache.folder / name}: damaged cache (its checksum differs); run prepare again" in error
    assert not (tmp_path / "run" / "evaluation").exists()


@pytest.mark.parametrize(("fault", "reason"), [(full, "the disk is full"), (broken, "cannot be written (Input/output")])
def test_results_that_cannot_be_saved_are_shown(
    command: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    fault: object,
    reason: str,
) -> None:
    out = tmp_path / "run" / "evaluation"
    assert main(command) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    table = capsys.readouterr().out.splitlines()[:-2]
    monkeypatch.setattr(os, "fsync", fault)
    assert main(command) == 2
    shown = capsys.readouterr()
    assert f"{out}: {reason}" in shown.err
    assert shown.out.splitlines() == table
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
