"""The command line from end to end on a small folder of pictures, and its answers to bad input."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import yaml
from golden_data import released_state_dict
from PIL import Image

from simmp_fast.cli import COMMANDS, build_parser, main

TINY = {
    "model": {
        "dmwla_size": 64,
        "depths": [1, 1, 1, 1],
        "feature_dim": 8,
        "decoder_clusters": 2,
        "decoder_feature_dim": 8,
        "slots": 6,
        "warmup_steps": 2,
    },
    "train": {"epochs": 2, "batch_size": 2, "wld_from": 1},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with eight pictures and masks, prepared and trained on for two epochs."""
    root = tmp_path_factory.mktemp("cli")
    rng = np.random.default_rng(0)
    for name in ("images", "masks"):
        (root / name).mkdir()
    for i in range(8):
        image = rng.integers(0, 80, (50, 70), dtype=np.uint8)
        mask = np.zeros_like(image)
        y, x = rng.integers(5, 25, 2)
        mask[y : y + 20, x : x + 20] = 255
        Image.fromarray(np.where(mask > 0, image + 120, image)).save(root / "images" / f"{i}.png")
        Image.fromarray(mask).save(root / "masks" / f"{i}.png")
    description = {
        "name": "squares",
        "classes": ["background", "square"],
        "mask_values": {0: 0, 255: 1},
        "split": {"train": 0.5, "validation": 0.25, "test": 0.25},
    }
    (root / "squares.yaml").write_text(yaml.safe_dump(description))
    (root / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    assert main(["prepare", str(root / "squares.yaml"), "--out", str(root / "cache"), "--image-size", "64"]) == 0
    assert main(train_command(root)) == 0
    return root


def train_command(root: Path, *more: str) -> list[str]:
    command = ["train", "--data", root / "cache", "--run", root / "run", "--preset", "small"]
    return [str(word) for word in (*command, "--config", root / "tiny.yaml", "--device", "cpu", *more)]


def test_a_run_folder_has_what_a_user_looks_for(place: Path) -> None:
    found = {path.name for path in (place / "run").iterdir()}
    wanted = {"config.yaml", "data.json", "metrics.jsonl", "curves.png", "overlays.png", "last.safetensors"}
    assert wanted <= found
    config = yaml.safe_load((place / "run" / "config.yaml").read_text())
    assert config["model"]["classes"] == 2, "classes come from the data"
    assert config["model"]["image_size"] == 64
    assert config["model"]["slots"] == 6, "the file wins over the preset"


def test_a_run_that_is_there_is_not_trained_over(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(train_command(place)) == 2
    assert "run" in capsys.readouterr().err


def test_resume_of_a_finished_run_changes_nothing(place: Path) -> None:
    before = (place / "run" / "metrics.jsonl").read_bytes()
    arguments = ["train", "--data", str(place / "cache"), "--run", str(place / "run"), "--resume", "--device", "cpu"]
    assert main(arguments) == 0
    assert (place / "run" / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("protocol", ["published", "strict"])
def test_evaluate(place: Path, capsys: pytest.CaptureFixture[str], protocol: str) -> None:
    arguments = ["evaluate", str(place / "run"), "--data", str(place / "cache"), "--protocol", protocol]
    assert main([*arguments, "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert f"protocol {protocol}" in printed
    assert (place / "run" / "evaluation" / f"test_{protocol}.csv").is_file()


def test_predict_a_picture(place: Path, tmp_path: Path) -> None:
    picture = tmp_path / "labels.png"
    arguments = ["predict", str(place / "run"), str(place / "images" / "0.png"), "--out", str(picture)]
    assert main([*arguments, "--device", "cpu"]) == 0
    assert np.asarray(Image.open(picture)).shape == (50, 70)


def test_predict_a_volume(place: Path, tmp_path: Path, nibabel: ModuleType) -> None:
    affine = np.array([[0.0, 2, 0, 1], [-1.5, 0, 0, 2], [0, 0, 3, 3], [0, 0, 0, 1]])
    volume = np.random.default_rng(1).integers(0, 255, (20, 30, 4), dtype=np.uint8)
    nibabel.save(nibabel.Nifti1Image(volume, affine), tmp_path / "head.nii.gz")
    target = tmp_path / "labels.nii.gz"
    arguments = ["predict", str(place / "run"), str(tmp_path / "head.nii.gz"), "--out", str(target), "--probabilities"]
    assert main([*arguments, "--device", "cpu", "--overlays"]) == 0
    labels = nibabel.load(target)
    assert labels.shape == (20, 30, 4)
    np.testing.assert_array_equal(labels.affine, affine)
    assert (tmp_path / "labels_probabilities.nii.gz").is_file()
    assert (tmp_path / "labels_overlay.png").is_file()
    assert main([*arguments, "--device", "cpu"]) == 2, "nothing is overwritten unasked"


def test_info(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(place / "run")]) == 0
    printed = capsys.readouterr().out
    for fact in ("parameters", "multiply-adds", "Triton kernels", "structured"):
        assert fact in printed


def test_info_of_a_preset(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--preset", "acdc"]) == 0
    assert "91.30 M trainable" in capsys.readouterr().out


def test_convert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(released_state_dict(), tmp_path / "released.pth")
    arguments = ["convert", str(tmp_path / "released.pth"), "--out", str(tmp_path / "net")]
    assert main(arguments) == 0
    assert json.loads((tmp_path / "net" / "config.json").read_text())["variant"] == "released"
    assert "93.57 M parameters" in capsys.readouterr().out
    assert main(arguments) == 2, "the folder is there already"
    assert main(["predict", str(tmp_path / "net"), "x.png", "--out", str(tmp_path / "y.png")]) == 2
    assert "data.json: no such file; name with --recipe" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("prepare nothing.yaml --out {0}/x", "nothing.yaml"),
        ("prepare lungs --out {0}/x", "data set: got 'lungs', expected one of acdc, demo"),
        ("prepare acdc --out {0}/x", "source: missing, expected the folder of the acdc download (--source)"),
        ("prepare acdc --source {0}/images --out {0}/x", "looked for patient001_frame01.nii.gz"),
        ("prepare acdc --source {0} --split mine --out {0}/x", "split: got 'mine', expected one of released, mt_unet"),
        ("prepare isic2018 --source {0} --split released --out {0}/x", "split: got 'released', expected none"),
        ("prepare demo --source {0} --out {0}/x", "expected none: only acdc, isic2018, segpc2021, synapse"),
        ("train --data {0}/none --run {0}/x", "none"),
        ("train --data {0}/cache --run {0}/x --preset huge", "preset: got 'huge'"),
        ("train --data {0}/cache --run {0}/x --set train.lr=fast", "train.lr: got 'fast', expected a float"),
        ("train --data {0}/cache --run {0}/x --set model.dmwla_size=32", "no window of 2 to 8"),
        ("train --data {0}/cache --run {0}/x --set model.classes=5", "model.classes: got 5, expected 2"),
        ("train --data {0}/cache --run {0}/x --preset small --backend triton --device cpu", "'triton' cannot run here"),
        ("train --data {0}/cache --run {0}/x --device warp", "--device: got 'warp'"),
        ("evaluate {0}/none --data {0}/cache", "none: no such file or folder"),
        ("evaluate {0}/images --data {0}/cache", "expected a run folder"),
        ("evaluate {0}/run --data {0}/cache --split holdout", "holdout"),
        ("predict {0}/run {0}/none.nii.gz --out {0}/y.nii.gz", "none.nii.gz"),
        ("convert {0}/squares.yaml --out {0}/y", "cannot be read as a checkpoint"),
        ("info --preset huge", "preset: got 'huge'"),
    ],
)
def test_bad_input(place: Path, capsys: pytest.CaptureFixture[str], command: str, message: str) -> None:
    assert main([word.format(place) for word in command.split()]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (place / "y.nii.gz").exists()
    assert not (place / "x" / "last.safetensors").exists()


@pytest.mark.parametrize("name", [module.__name__.rsplit(".", 1)[-1] for module in COMMANDS])
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        build_parser().parse_args([name, "--help"])
    assert stopped.value.code == 0
    assert f"simmp-fast {name}" in capsys.readouterr().out.split("example:")[1]
