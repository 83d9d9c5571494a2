"""Each published data set from its download to a prediction, with few cases and a small network."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import published_sets as sets
import pytest
from PIL import Image

from simmp_fast.cli import main
from simmp_fast.data import acdc, isic2018, segpc2021, synapse

SMALL = """
model: {backbone: maxvit_rmlp_pico_rw_256, dmwla_size: 64, depths: [1, 1, 1, 1], feature_dim: 8, decoder_clusters: 2,
        decoder_feature_dim: 8, slots: 6, warmup_steps: 2}
train: {epochs: 1, batch_size: 3}
"""


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Splits of a few cases."""
    monkeypatch.setitem(synapse.SPLIT, "train_slices_per_case", {"case0005": 4, "case0006": 3})
    monkeypatch.setattr(synapse, "PARTS", {"train": ["case0005", "case0006"], "validation": [], "test": ["case0001"]})
    monkeypatch.setattr(acdc, "PATIENTS", (2, 19, 3))
    monkeypatch.setattr(isic2018, "COUNTS", {"train": 6, "validation": 2, "test": 2})
    monkeypatch.setattr(segpc2021, "COUNTS", {"train": 8, "validation": 2})
    monkeypatch.setattr(segpc2021, "VALIDATION", 2)


@dataclass(frozen=True)
class Download:
    """A data set to write, and what is expected of it.

    Attributes:
        name: of the data set and of the preset.
        write: writes it to a folder.
        new: a file of it to predict.
        cases: of each split.
        unit: of distances under the strict protocol.
        options: more arguments of prepare.
    """

    name: str
    write: Callable[[Path], None]
    new: str | None
    cases: list[int]
    unit: str
    options: tuple[str, ...] = ()


DOWNLOADS = {
    "synapse prepared": Download("synapse", sets.write_synapse_prepared, None, [2, 0, 1], "voxel"),
    "synapse raw": Download("synapse", sets.write_synapse_raw, "img/img0001.nii.gz", [2, 0, 1], "mm"),
    "acdc raw": Download(
        "acdc", sets.write_acdc_raw, "training/patient003/patient003_frame01.nii.gz", [2, 4, 0], "mm",
        ("--split", "ssl4mis"),
    ),
    "isic2018": Download(
        "isic2018", partial(sets.write_isic2018, count=10), f"{isic2018.IMAGES}/ISIC_0000003.jpg", [6, 2, 2], "voxel"
    ),
    "segpc2021": Download(
        "segpc2021", partial(sets.write_segpc2021, counts=(8, 2)), "validation/x/100.bmp", [6, 2, 2], "voxel"
    ),
}  # fmt: skip


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("download", DOWNLOADS.values(), ids=DOWNLOADS)
def test_from_download_to_prediction(download: Download, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = download.name
    source, cache, run = tmp_path / "download", tmp_path / "cache", tmp_path / "run"
    download.write(source)
    (tmp_path / "small.yaml").write_text(SMALL)

    def command(*words: str | Path) -> str:
        assert main([str(word) for word in words]) == 0
        return capsys.readouterr().out

    said = command("prepare", name, "--source", source, *download.options, "--out", cache, "--image-size", "64")
    assert said.startswith(f"{name}: train ")
    train = ["train", "--data", cache, "--run", run, "--preset", name, "--config", tmp_path / "small.yaml"]
    command(*train, "--device", "cpu")
    splits = json.loads((run / "splits.json").read_text())
    assert [len(splits[part]) for part in ("train", "validation", "test")] == download.cases

    part = "test" if splits["test"] else "validation"
    for protocol, distance in (("published", "voxel"), ("strict", download.unit)):
        evaluate = ["evaluate", run, "--data", cache, "--split", part, "--protocol", protocol, "--device", "cpu"]
        assert f"HD95 [{distance}]" in command(*evaluate)
    if download.new is not None:
        new = source / download.new
        target = tmp_path / ("labels.nii.gz" if new.suffix == ".gz" else "labels.png")
        command("predict", run, new, "--out", target, "--device", "cpu")
        if target.suffix == ".png":
            assert np.asarray(Image.open(target)).shape == (sets.SIDE, sets.SIDE + 2)
        else:
            image, labels = sets.nibabel.load(new), sets.nibabel.load(target)
            assert labels.shape == image.shape
            np.testing.assert_array_equal(labels.get_qform(), image.get_qform())
            np.testing.assert_array_equal(labels.get_sform(), image.get_sform())
