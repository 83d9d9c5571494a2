"""Runs that are begun again, gone back to, or whose folder is not what it was."""

from __future__ import annotations

import argparse
import math
import shutil
from pathlib import Path

import pytest
import torch
from test_train_loop import fail_at
from training_stubs import TinyModel, assert_equal_runs, tiny_config

from simmp_fast.cli.train import configuration
from simmp_fast.config import ConfigError, from_mapping, preset, to_mapping
from simmp_fast.data.errors import DataError
from simmp_fast.training import loop
from simmp_fast.training.checkpoint import load_last, previous_step
from simmp_fast.training.errors import TrainingError
from simmp_fast.training.log import read_metrics
from simmp_fast.training.loop import train
from simmp_fast.training.run_folder import saved_config

pytestmark = pytest.mark.usefixtures("stub")
STEPS = 5


@pytest.fixture(scope="module")
def finished(cache, tmp_path_factory) -> Path:
    """A run of one epoch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "SimMPNet", TinyModel)
        patch.setattr(loop.RunPictures, "draw", lambda *_, **__: None)
        patch.setattr(torch, "get_num_threads", lambda: 1)
        run = tmp_path_factory.mktemp("finished") / "run"
        train(tiny_config(epochs=1), cache, run, device="cpu")
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(finished, tmp_path / "run")


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != "run.lock"}


def test_a_run_that_diverged_goes_back(cache, tmp_path, monkeypatch):
    run, straight = tmp_path / "run", tmp_path / "straight"
    train(tiny_config(), cache, straight, device="cpu")
    with monkeypatch.context() as patch:
        fail_at(patch, 2 * STEPS + 1)
        for resume in (False, True):  # the last checkpoint leads there every time
            with pytest.raises(TrainingError, match=r"last.safetensors \(step 10\), .*previous.safetensors \(step 5\)"):
                train(tiny_config(), cache, run, resume=resume, device="cpu")
    train(tiny_config(epochs=3), cache, run, resume="previous", device="cpu")
    assert "resumed at step 5, epoch 1" in (run / "train.log").read_text()
    assert_equal_runs(run, straight)


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("where", ["before the first step", "in the first step"])
def test_a_run_that_failed_at_once_begins_again(cache, tmp_path, monkeypatch, where, resume):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        if where == "in the first step":
            fail_at(patch, 0, math.nan)
        else:
            patch.setattr(loop, "make_optimizer", lambda *_: (_ for _ in ()).throw(ConfigError("train.backend: no")))
        with pytest.raises((TrainingError, ConfigError)):
            train(tiny_config(lr=0.5), cache, run, device="cpu")
    train(tiny_config(epochs=1), cache, run, resume=resume, device="cpu")
    assert load_last(run)[2].config["train"]["lr"] == 0.001


def test_the_first_step_is_saved(cache, tmp_path, monkeypatch):
    fail_at(monkeypatch, 3)
    with pytest.raises(TrainingError, match=r"last checkpoint is .*last.safetensors \(step 1\)\. "):
        train(tiny_config(), cache, tmp_path / "run", device="cpu")
    assert load_last(tmp_path / "run")[2].step == 1
    assert previous_step(tmp_path / "run") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda text: text.replace('"kind": "epoch"', '"kind": "epoxy"'),
            "got other rows than the run wrote: the first",
        ),
        (lambda text: text[:-9], r"got \d+ bytes, expected the \d+ the checkpoint knows of"),
        (lambda text: "", "got 0 bytes, expected"),
    ],
    ids=["exchanged", "cut", "empty"],
)
def test_metrics_of_another_run_are_refused(cache, run, change, message):
    path = run / "metrics.jsonl"
    text = path.read_text()
    path.write_text(change(text))
    before = files_of(run)
    with pytest.raises(DataError, match=rf"metrics\.jsonl: {message}"):
        train(tiny_config(epochs=2), cache, run, resume=True, device="cpu")
    assert files_of(run) == before


def test_metrics_that_were_removed_do_not_stand_in_the_way(cache, run):
    (run / "metrics.jsonl").unlink()
    result = train(tiny_config(epochs=2), cache, run, resume=True, device="cpu")
    assert f"{run}/metrics.jsonl: missing; its rows are lost" in (run / "train.log").read_text()
    epochs = {row["epoch"] for row in read_metrics(run / "metrics.jsonl")}
    assert (result.epoch, epochs) == (2, {1})
    train(tiny_config(epochs=3), cache, run, resume=True, device="cpu")


def test_another_data_set_is_refused(cache, run, monkeypatch):
    monkeypatch.setitem(cache.splits, "test", ["case99"])
    before = files_of(run)
    with pytest.raises(
        ConfigError, match=r"started with other data \(splits.json\): test is \['case99'\], saved as \[\]"
    ):
        train(tiny_config(epochs=2), cache, run, resume=True, device="cpu")
    assert files_of(run) == before


def test_what_changed_is_logged(cache, run):
    (run / "config.yaml").unlink()
    train(tiny_config(epochs=2, log_every=3), cache, run, resume=True, device="cpu")
    said = (run / "train.log").read_text()
    assert f"{run}/config.yaml: missing; written again from the checkpoint" in said
    assert "settings: train.epochs is 2, saved as 1; train.log_every is 3, saved as 2" in said
    assert "cpu_threads" not in said
    assert (run / "config.yaml").exists()


@pytest.mark.parametrize("instead", ["nothing", "another folder"])
def test_a_folder_that_goes_away_is_not_made_again(cache, tmp_path, monkeypatch, instead):
    run, moved, straight = tmp_path / "run", tmp_path / "moved", tmp_path / "straight"
    plain = loop.TrainStep.__call__

    def moving(self, images, labels, number, *, wld):
        if number == STEPS + 1:
            run.rename(moved)
            if instead == "another folder":
                run.mkdir()
        return plain(self, images, labels, number, wld=wld)

    with monkeypatch.context() as patch:
        patch.setattr(loop.TrainStep, "__call__", moving)
        with pytest.raises(TrainingError, match=r"run: the folder was moved or removed while the run wrote there"):
            train(tiny_config(), cache, run, device="cpu")
    assert [path.name for path in tmp_path.glob("run/*")] == []
    assert run.exists() == (instead == "another folder")
    train(tiny_config(), cache, straight, device="cpu")
    train(tiny_config(), cache, moved, resume=True, device="cpu")
    assert_equal_runs(moved, straight)


@pytest.mark.parametrize(
    ("name", "kind", "error"),
    [
        ("tensorboard", "file", TrainingError),
        ("metrics.jsonl", "folder", (DataError, TrainingError)),
        ("train.log", "folder", TrainingError),
        ("environment.json", "folder", DataError),
        ("run.lock", "folder", ConfigError),
        ("config.yaml", "folder", ConfigError),
        ("data.json", "folder", ConfigError),
    ],
)
def test_files_that_cannot_be_written_are_named(cache, run, name, kind, error):
    weights = (run / "last.safetensors").read_bytes()
    path = run / name
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    if kind == "file":
        path.touch()
    else:
        path.mkdir()
    with pytest.raises(error, match=name):
        train(tiny_config(epochs=2), cache, run, resume=True, device="cpu")
    assert (run / "last.safetensors").read_bytes() == weights


def arguments(folder: Path, *, resume: str | bool) -> argparse.Namespace:
    return argparse.Namespace(folder=folder, resume=resume, preset="synapse", config=None, backend=None, set=[])


def test_a_resumed_run_keeps_its_configuration(cache, run):
    expected = tiny_config(epochs=1)
    assert configuration(arguments(run, resume="last"), cache) == expected
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text[: len(text) // 3])
    with pytest.raises(ConfigError, match=r"config.yaml: .*; restore it, or remove it, and --resume writes it again"):
        configuration(arguments(run, resume="last"), cache)
    (run / "config.yaml").unlink()  # the checkpoint knows it too
    assert configuration(arguments(run, resume="last"), cache) == expected
    (run / "config.yaml").write_text("model: [")
    with pytest.raises(ConfigError, match=r"config.yaml: cannot be read as YAML.*restore it, or remove it"):
        configuration(arguments(run, resume="last"), cache)
    assert (
        configuration(arguments(run, resume=False), cache).train
        == from_mapping(type(expected), to_mapping(preset("synapse"))).train
    )


def test_a_damaged_state_does_not_stand_in_the_way_back(cache, run):
    (run / "last.state.pt").write_bytes(b"damaged")
    for resume in ("last", "previous"):
        assert configuration(arguments(run, resume=resume), cache) == tiny_config(epochs=1)
    with pytest.raises(DataError, match=r"last.state.pt: damaged.*of step 1: --resume previous"):
        train(tiny_config(epochs=1), cache, run, resume=True, device="cpu")
    (run / "config.yaml").unlink()
    (run / "last.safetensors").unlink()
    assert configuration(arguments(run, resume="previous"), cache) == tiny_config(epochs=1)
    assert train(tiny_config(epochs=1), cache, run, resume="previous", device="cpu").step == STEPS
    assert load_last(run)[2].step == STEPS


@pytest.mark.parametrize("text", ["{}", "model: {}\ntrain: {}\n", "- 1", "model: 3\n", "[[[[", "1: 2\n"])
def test_other_things_in_place_of_a_configuration(run, text):
    (run / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"config.yaml: .*restore it, or remove it"):
        saved_config(run)
