"""The command line from end to end on a small folder of pictures, and its answers to bad input."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import yaml
from golden_data import released_state_dict
from PIL import Image

from simmp_fast.cli import main

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


@pytest.fixture
def evaluated(place: Path, tmp_path: Path) -> list[str]:
    """A command whose results lie in `tmp_path / "results"`."""
    command = ["evaluate", place / "run", "--data", place / "cache", "--device", "cpu", "--out", tmp_path / "results"]
    assert main([str(word) for word in command]) == 0
    return [str(word) for word in command]


def prepared(place: Path, folder: Path, **changes: object) -> str:
    """The fixture's pictures as another data set; its cache."""
    description = {**yaml.safe_load((place / "squares.yaml").read_text()), "images": str(place / "images")}
    file = folder / "other.yaml"
    file.write_text(yaml.safe_dump({**description, "masks": str(place / "masks"), **changes}))
    cache = str(folder / "other")
    assert main(["prepare", str(file), "--out", cache, "--image-size", "64"]) == 0
    return cache


def test_results_say_what_was_measured(place: Path, tmp_path: Path, evaluated: list[str]) -> None:
    found = json.loads((tmp_path / "results" / "test_published.json").read_text())
    manifest = json.loads((place / "cache" / "manifest.json").read_text())
    assert (found["dataset"], found["cache"]) == ("squares", manifest["checksum"])
    assert found["weights"]["file"] == "best.safetensors"
    assert len(found["weights"]["sha256"]) == 64


def test_data_prepared_in_another_way_are_refused(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    intensity = {"rule": "percentile", "low": 1, "high": 99}
    other = prepared(place, tmp_path, classes=["background", "disc"], intensity=intensity, slice_axis="coronal")
    assert main(["evaluate", str(place / "run"), "--data", other, "--out", str(tmp_path / "results")]) == 2
    error = capsys.readouterr().err
    assert f"{other}: differs from what the network was trained on ({place}/run/data.json): 3 problems" in error
    assert "classes: got ['background', 'disc'], expected ['background', 'square']" in error
    assert "intensity: got percentile 1.0 to 99.0, expected range 0.0 to 255.0" in error
    assert "slice_axis: got 'coronal', expected 'axial'" in error
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("record", ["kept", "without a record", "no JSON"])
def test_results_of_other_data_stay(
    place: Path, tmp_path: Path, evaluated: list[str], capsys: pytest.CaptureFixture[str], record: str
) -> None:
    other = prepared(place, tmp_path, name="others")
    results = tmp_path / "results"
    summary = results / "test_published.json"
    if record == "without a record":
        content = json.loads(summary.read_text())
        summary.write_text(json.dumps({key: value for key, value in content.items() if key != "cache"}))
    if record == "no JSON":
        summary.unlink()
    before = {path.name: path.read_bytes() for path in results.iterdir()}
    command = [other if word == str(place / "cache") else word for word in evaluated]
    assert main(command) == 2
    error = capsys.readouterr().err
    whose = "of 'squares' (cache " if record == "kept" else "of unknown data"
    assert f"{summary}: got results {whose}" in error
    assert "expected none or those of 'others'" in error
    assert "--out" in error
    assert {path.name: path.read_bytes() for path in results.iterdir()} == before
    assert main([*command, "--overwrite"]) == 0
    assert json.loads(summary.read_text())["dataset"] == "others"


def test_results_of_the_same_data_are_replaced(
    place: Path, evaluated: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(evaluated) == 0
    assert capsys.readouterr().err == ""
    assert main(["evaluate", str(place / "run" / "last.safetensors"), *evaluated[2:]]) == 0
    assert "replaced results of other weights (best.safetensors)" in capsys.readouterr().err


def test_weights_alone_know_their_data(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(place / "run" / "best.safetensors", tmp_path)
    command = ["evaluate", str(tmp_path / "best.safetensors"), "--device", "cpu", "--data"]
    assert main([*command, str(place / "cache")]) == 0
    assert "not compared" not in capsys.readouterr().err
    assert main([*command, prepared(place, tmp_path, classes=["background", "disc"])]) == 2
    assert "classes: got ['background', 'disc'], expected ['background', 'square']" in capsys.readouterr().err


def test_results_are_saved_before_they_are_shown(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", screen)
    command = [
        "evaluate",
        place / "run",
        "--data",
        place / "cache",
        "--device",
        "cpu",
        "--out",
        tmp_path / "r\xe9sum\xe9",
    ]
    assert main([str(word) for word in command]) == 0
    screen.flush()
    assert b"\\xe9/test_published.csv" in screen.buffer.getvalue()  # type: ignore[attr-defined]

    def broken(self: object) -> str:
        raise OSError("the terminal is gone")

    monkeypatch.setattr("simmp_fast.evaluation.report.Evaluation.table", broken)
    command[-1] = tmp_path / "saved"
    assert main([str(word) for word in command]) == 2
    assert (tmp_path / "saved" / "test_published.json").is_file()


def test_a_recipe_that_does_not_fit_the_network(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = json.loads((place / "run" / "data.json").read_text())
    recipe.update(channels=3, image_size=96, classes=["a", "b", "c"])
    (tmp_path / "data.json").write_text(json.dumps(recipe))
    command = ["predict", place / "run", place / "images", "--out", tmp_path / "out", "--device", "cpu", "--recipe"]
    assert main([str(word) for word in [*command, tmp_path / "data.json"]]) == 2
    need = "got classes 2, in_channels 1, image_size 64, expected classes 3, in_channels 3, image_size 96"
    assert need in capsys.readouterr().err
    (tmp_path / "twice.json").write_text('{"name": "x",\n "channels": 1,\n "channels": 3}')
    assert main([str(word) for word in [*command, tmp_path / "twice.json"]]) == 2
    assert "twice.json: cannot be read as JSON: channels: got this key twice, see line 2, 3" in capsys.readouterr().err


def test_predict_names_what_it_leaves_out(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, out = tmp_path / "images", tmp_path / "images" / "labels"
    (images / "more").mkdir(parents=True)
    shutil.copy(place / "images" / "0.png", images / "a$_1$.png")
    shutil.copy(place / "images" / "1.png", os.fsencode(images) + b"/caf\xe9.png")
    for name in (".hidden", *(f"{i:02}.txt" for i in range(25))):
        (images / name).touch()
    command = [str(w) for w in ("predict", place / "run", images, "--out", out, "--overlays", "--device", "cpu")]
    for _ in range(2):
        assert main([*command, "--overwrite"]) == 0
        error = capsys.readouterr().err
        assert f"{images}, left out: 26, expected files of kind .nii" in error, (
            "the folder of the label maps is not one"
        )
        assert error.splitlines()[-2:] == ["  19.txt", "  ... and 6 more"]
        assert "hidden" not in error
    names = {b"a$_1$.png", b"a$_1$_overlay.png", b"caf\xe9.png", b"caf\xe9_overlay.png"}
    assert set(os.listdir(os.fsencode(out))) == names


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
    assert "91.30 M, backbone classifier" in capsys.readouterr().out


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
        ("train --data {0}/cache --run {0}/x --device meta", "--device: got 'meta', which cannot be used here"),
        ("train --data {0}/cache --run {0}/x --device=", "--device: got '', which cannot be used here"),
        ("train --data {0}/cache --run {0}/squares.yaml/x", "squares.yaml/x: cannot be used as a run folder"),
        ("train --data {0}/cache --run {0}/x --set train.lr=[1", "--set: got 'train.lr=[1', whose value cannot be"),
        ("train --data {0}/cache --run {0}/x --set train.lr=.nan", "train.lr: got nan, expected a finite number"),
        ("evaluate {0}/run --data {0}/cache --device xla", "--device: got 'xla', which cannot be used here"),
        ("evaluate {0}/run --data {0}/cache --device cpu:1", "--device: got 'cpu:1', which cannot be used here"),
        ("evaluate {0}/run --data {0}/cache --out {0}/tiny.yaml", "tiny.yaml: got a file, expected a folder"),
        ("evaluate {0}/tiny.yaml --data {0}/cache", "tiny.yaml: cannot be read as safetensors"),
        ("predict {0}/run {0}/images/0.png --out {0}/tiny.yaml/y.png", "tiny.yaml: got a file, expected a folder"),
        ("predict {0}/images/0.png {0}/images --out {0}/y", "images/0.png: cannot be read as safetensors"),
        ("info {0}/images/0.png", "images/0.png: cannot be read as safetensors"),
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
