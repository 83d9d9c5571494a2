"""The demo from a cache prepared elsewhere, where neither nilearn nor nibabel is installed."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_demo import demo_cache

from simmp_fast.cli import main
from simmp_fast.data import Geometry, Intensity, Recipe
from simmp_fast.data.cache import CacheWriter

TINY = (
    "model.dmwla_size=64 model.depths=[1,1,1,1] model.feature_dim=8 model.decoder_clusters=2 "
    "model.decoder_feature_dim=8 model.slots=6 model.warmup_steps=2 train.epochs=1 train.batch_size=4"
)


@pytest.fixture(autouse=True)
def nothing_that_reads_volumes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("nilearn", "nibabel"):
        monkeypatch.setitem(sys.modules, name, None)


def test_the_whole_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    demo_cache(tmp_path / "cache")
    arguments = ["demo", "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert main([*arguments, "--set", *TINY.split()]) == 0
    assert "protocol strict" in capsys.readouterr().out
    assert np.asarray(Image.open(tmp_path / "out" / "prediction.png")).shape == (64, 64)
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert found == {"run", "evaluation", "held_out_slice.png", "prediction.png", "prediction_overlay.png"}


def test_without_a_cache_the_error_names_the_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--out", str(tmp_path / "out"), "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert "pip install nilearn" in error
    assert "simmp-fast demo --cache DIR" in error


def test_other_caches_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with CacheWriter(tmp_path, Recipe("skin", ("no", "yes"), 1, 8, Intensity("range", 0, 255)), 1, "uint8") as writer:
        image, label = np.zeros((1, 1, 8, 8), np.float32), np.zeros((1, 8, 8), np.uint8)
        writer.add("a", "a.png", image, label, label, Geometry((1, 8, 8)))
        writer.finish({"train": ["a"], "validation": [], "test": []})
    for folder, message in ((tmp_path, "a cache of 'skin', expected one that prepare demo wrote"), ("no", "no: not")):
        assert main(["demo", "--cache", str(folder), "--out", str(tmp_path / "out"), "--device", "cpu"]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
