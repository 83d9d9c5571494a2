from __future__ import annotations

import dataclasses
import json
import math
import resource

import pytest
import torch
from safetensors.torch import load_file
from training_stubs import CLASSES, TinyModel, assert_equal_runs, tiny_config

from simmp_fast.config import ConfigError
from simmp_fast.data.errors import DataError
from simmp_fast.model.wld import UpdateWidth
from simmp_fast.training import loop
from simmp_fast.training.checkpoint import load_last, read_weights
from simmp_fast.training.errors import TrainingError
from simmp_fast.training.log import read_metrics
from simmp_fast.training.loop import train

pytestmark = pytest.mark.usefixtures("stub")
STEPS = 5  # an epoch of the fixture's ten slices at batch size 2


def kinds(run, kind):
    return [row for row in read_metrics(run / "metrics.jsonl") if row["kind"] == kind]


def fail_at(monkeypatch, step: int, value: float = math.nan) -> None:
    """Make the loss of one step `value`."""
    plain = loop.TrainStep.__call__

    def poisoned(self, images, labels, number, *, wld):
        return plain(self, images + value if number == step else images, labels, number, wld=wld)

    monkeypatch.setattr(loop.TrainStep, "__call__", poisoned)


def test_a_whole_run(cache, tmp_path, capsys, with_pictures):
    run = tmp_path / "run"
    config = tiny_config(overlays=2, keep_every=2, lr=0.02)
    result = train(config, cache, run, device="cpu")
    assert (result.folder, result.step, result.epoch, result.interrupted) == (run, 3 * STEPS, 3, False)
    assert result.best is not None
    assert 0 <= result.best <= 1

    rows = kinds(run, "train")
    assert [row["step"] for row in rows] == list(range(2, 3 * STEPS + 1, 2))
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert rows[0]["lr"] == 0.02
    assert rows[0]["memory"] == "structured"
    assert rows[0]["images_per_second"] > 0
    assert [row["epoch"] for row in kinds(run, "epoch")] == [0, 1, 2]
    dices = [row["dice"] for row in kinds(run, "validation")]
    assert len(dices) == 3
    assert result.best == max(dices)

    _, best = read_weights(run / "best.safetensors")
    assert best.step == STEPS * (1 + dices.index(max(dices)))
    _, kept = read_weights(run / "epoch_002.safetensors")
    assert (kept.epoch, kept.classes, kept.model) == (2, CLASSES, config.model)
    for picture in ("curves.png", "overlays.png"):
        assert (run / picture).read_bytes().startswith(b"\x89PNG")
    assert any((run / "tensorboard").iterdir())
    assert json.loads((run / "data.json").read_text())["classes"] == list(CLASSES)
    assert json.loads((run / "splits.json").read_text())["validation"] == cache.splits["validation"]
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 4  # not a terminal: a line at the start and one an epoch
    assert "validation Dice" in said[-1]
    assert said[-1] in (run / "train.log").read_text()


def test_the_mean_loss_is_of_its_own_epoch(cache, tmp_path):
    run = tmp_path / "run"
    train(tiny_config(log_every=1), cache, run, device="cpu")
    for row in kinds(run, "epoch"):
        losses = [r["loss"] for r in kinds(run, "train") if r["epoch"] == row["epoch"]]
        assert len(losses) == STEPS
        assert row["mean_loss"] == pytest.approx(sum(losses) / STEPS)


def test_two_runs_are_the_same(cache, tmp_path):
    for name in ("a", "b"):
        train(tiny_config(epochs=1), cache, tmp_path / name, device="cpu")
    assert_equal_runs(tmp_path / "a", tmp_path / "b")


def test_validation_schedule_and_training_mode(cache, tmp_path, monkeypatch):
    modes, validated = [], []
    plain_step, plain_dice = loop.TrainStep.__call__, loop.case_dice

    def step(self, *arguments, **keywords):
        modes.append(all(module.training for module in self.model.modules()))
        return plain_step(self, *arguments, **keywords)

    def dice(model, *arguments, **keywords):
        validated.append(len(modes) // STEPS - 1)
        return plain_dice(model, *arguments, **keywords)

    monkeypatch.setattr(loop.TrainStep, "__call__", step)
    monkeypatch.setattr(loop, "case_dice", dice)
    train(tiny_config(epochs=6, validate_from=1, validate_every=3), cache, tmp_path / "run", device="cpu")
    assert validated == [1, 4, 5]  # from 1 on every third, and the last
    assert modes == [True] * (6 * STEPS)


def test_running_statistics_go_on_after_validation(cache, tmp_path, monkeypatch):
    counts = []

    def forgetful(model, *_, **__):
        counts.append(int(model.eval().backbone[1].num_batches_tracked))
        return [0.5]

    monkeypatch.setattr(loop, "case_dice", forgetful)
    train(tiny_config(), cache, tmp_path / "run", device="cpu")
    assert counts == [STEPS, 2 * STEPS, 3 * STEPS]


@pytest.mark.parametrize(("every", "kind", "name"), [("step", "train", "loss"), ("epoch", "epoch", "mean_loss")])
def test_wld_starts_at_its_epoch(cache, tmp_path, monkeypatch, every, kind, name):
    taken, remembered = [], []
    monkeypatch.setattr(UpdateWidth, "step", lambda _, loss: taken.append(float(loss)))
    monkeypatch.setattr(UpdateWidth, "remember", lambda _, loss: remembered.append(float(loss)))
    run = tmp_path / "run"
    train(tiny_config(wld_every=every, log_every=1), cache, run, device="cpu")
    if every == "step":  # the first of its epochs only remembers
        assert remembered == [row[name] for row in kinds(run, kind) if row["epoch"] == 1]
        assert taken == [row[name] for row in kinds(run, kind) if row["epoch"] == 2]
        assert len(remembered) == len(taken) == STEPS
    else:
        assert taken == [row[name] for row in kinds(run, kind) if row["epoch"] >= 1]
        assert len(taken) == 2
        assert remembered == []


def test_the_width_first_changes_in_the_epoch_after_wld_from(cache, tmp_path):
    """With losses that differ by a number that sets the width, and the last of the epoch before to compare with."""
    run = tmp_path / "run"
    train(tiny_config(log_every=1, lr=1e-2), cache, run, device="cpu")
    rows = kinds(run, "train")
    assert {row["k"] for row in rows if row["epoch"] <= 1} == {4}
    width, previous = 4, next(row["loss"] for row in reversed(rows) if row["epoch"] == 1)
    for row in (row for row in rows if row["epoch"] == 2):
        proposed = int(8 * (0.5 - 0.5 * (previous - row["loss"])))
        width, previous = proposed if 2 <= proposed <= 6 else 4, row["loss"]
        assert row["k"] == width


def test_best_ignores_an_undefined_dice(cache, tmp_path, monkeypatch):
    dices = iter([[], [0.25], [0.125]])
    monkeypatch.setattr(loop, "case_dice", lambda *_, **__: next(dices))
    result = train(tiny_config(), cache, tmp_path / "run", device="cpu")
    assert result.best == 0.25
    assert read_weights(tmp_path / "run" / "best.safetensors")[1].epoch == 2
    assert kinds(tmp_path / "run", "validation")[0]["dice"] is None


def test_a_non_finite_loss_stops_the_run_and_keeps_the_last_good_checkpoint(cache, tmp_path, monkeypatch):
    run = tmp_path / "run"
    straight = tmp_path / "straight"
    train(tiny_config(), cache, straight, device="cpu")
    with monkeypatch.context() as patch:
        fail_at(patch, 7)
        with pytest.raises(TrainingError, match=r"step 7, epoch 1: the loss is nan at learning rate 0\.001") as error:
            train(tiny_config(), cache, run, device="cpu")
    assert f"the last checkpoint is {run}/last.safetensors (step 5), the one before it" in str(error.value)
    assert (
        f"{run}/previous.safetensors (step 1): if the last already leads here, go back with --resume previous"
        in str(error.value)
    )
    assert str(error.value) in (run / "train.log").read_text()
    tensors, meta, state = load_last(run)
    assert meta.step == state.step == STEPS
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    train(tiny_config(), cache, run, resume=True, device="cpu")  # without the poison it goes on from there
    assert_equal_runs(run, straight)


@pytest.mark.parametrize(
    ("minutes", "kept"),
    [(60.0, r"last\.safetensors \(step 1\)"), (1e-9, r"last\.safetensors \(step 2\), the one before .*\(step 1\)")],
)
def test_a_bad_step_that_nobody_looked_at_reaches_no_checkpoint(cache, tmp_path, monkeypatch, minutes, kept):
    run = tmp_path / "run"
    fail_at(monkeypatch, 2, math.inf)
    plain = loop.Run._train_epoch

    def as_on_a_gpu(self):
        self.reading_is_free = False
        plain(self)

    monkeypatch.setattr(loop.Run, "_train_epoch", as_on_a_gpu)
    with pytest.raises(TrainingError, match=rf"step 2, epoch 0: the loss is .*{kept}"):
        train(tiny_config(checkpoint_minutes=minutes, log_every=100), cache, run, device="cpu")
    saved = load_last(run)
    assert saved[2].step == (1 if minutes > 1 else 2)
    assert not (run / "best.safetensors").exists()
    assert [row["kind"] for row in read_metrics(run / "metrics.jsonl")] == []


def test_poisoned_weights_name_the_first_step(cache, tmp_path, monkeypatch):
    def broken(config, backend):
        model = TinyModel(config, backend)
        with torch.no_grad():
            model.heads[0].weight[0] = math.nan
        return model

    monkeypatch.setattr(loop, "SimMPNet", broken)
    with pytest.raises(TrainingError, match=r"step 0, epoch 0: the loss is nan.*no checkpoint was written yet"):
        train(tiny_config(), cache, tmp_path / "run", device="cpu")
    assert not list((tmp_path / "run").glob("*.safetensors"))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard writes in a thread
@pytest.mark.parametrize(
    ("room", "message"),
    [
        (20, r"metrics\.jsonl: cannot be written"),
        (4000, r"last\.s.*could not be written"),
    ],
)
def test_a_disk_that_fills_up(cache, tmp_path, monkeypatch, capsys, room, message):
    run = tmp_path / "run"
    straight = tmp_path / "straight"
    train(tiny_config(), cache, straight, device="cpu")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    plain = loop.TrainStep.__call__

    def filling(self, images, labels, number, *, wld):
        if number == STEPS + 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        return plain(self, images, labels, number, wld=wld)

    with monkeypatch.context() as patch:
        patch.setattr(loop.TrainStep, "__call__", filling)
        try:
            with pytest.raises(TrainingError, match=message):
                train(tiny_config(), cache, run, device="cpu")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert load_last(run)[2].step == STEPS
    assert not [path.name for path in run.iterdir() if path.name.startswith(".") or "pending" in path.name]
    train(tiny_config(), cache, run, resume=True, device="cpu")
    assert_equal_runs(run, straight)


def test_no_validation_cases(cache, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(cache.splits, "validation", [])
    result = train(tiny_config(epochs=1), cache, tmp_path / "run", device="cpu")
    assert result.best is None
    assert not (tmp_path / "run" / "best.safetensors").exists()
    assert "no validation cases" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": 4}, r"model\.classes: got 4, expected 3 as the data set 'shapes' has"),
        ({"in_channels": 3}, r"model\.in_channels: got 3, expected 1"),
        ({"image_size": 128}, r"model\.image_size: got 128, expected 64"),
    ],
)
def test_a_network_for_other_data(cache, tmp_path, change, message):
    config = tiny_config()
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **change))
    with pytest.raises(ConfigError, match=message):
        train(config, cache, tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_an_edited_network_is_refused(cache, tmp_path):
    run = tmp_path / "run"
    train(tiny_config(epochs=1), cache, run, device="cpu")
    path = run / "config.yaml"
    path.write_text(path.read_text().replace("feature_dim: 8", "feature_dim: 16", 1))
    config = tiny_config(epochs=2)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, feature_dim=16))
    with pytest.raises(ConfigError, match=r"config\.yaml: .*model\.feature_dim is 16, saved as 8"):
        train(config, cache, run, resume=True, device="cpu")


def test_a_truncated_checkpoint_is_named_on_resume(cache, tmp_path):
    run = tmp_path / "run"
    train(tiny_config(epochs=1), cache, run, device="cpu")
    content = (run / "last.state.pt").read_bytes()
    (run / "last.state.pt").write_bytes(content[:-100])
    with pytest.raises(DataError, match=r"last\.state\.pt: damaged.*of step 1: --resume previous"):
        train(tiny_config(epochs=2), cache, run, resume=True, device="cpu")


def test_resume_of_a_finished_run_changes_nothing(cache, tmp_path):
    run = tmp_path / "run"
    first = train(tiny_config(epochs=2), cache, run, device="cpu")
    weights = load_file(run / "last.safetensors")
    again = train(tiny_config(epochs=2), cache, run, resume=True, device="cpu")
    assert again == first
    assert all(torch.equal(weights[n], t) for n, t in load_file(run / "last.safetensors").items())


def test_a_run_that_cannot_begin_leaves_no_run(cache, tmp_path, monkeypatch):
    run = tmp_path / "run"

    def refuse(self, source):
        raise ConfigError(f"train.backbone_weights: {source}: no such file")

    monkeypatch.setattr(torch.nn.Sequential, "load_weights", refuse, raising=False)
    with pytest.raises(ConfigError, match="no such file"):
        train(tiny_config(backbone_weights="typo"), cache, run, device="cpu")
    assert [path.name for path in run.iterdir()] == ["run.lock"]
    train(tiny_config(epochs=1), cache, run, device="cpu")


def test_backbone_weights(cache, tmp_path, monkeypatch):
    sources = []
    monkeypatch.setattr(torch.nn.Sequential, "load_weights", lambda self, s: sources.append(s), raising=False)
    for i, source in enumerate(["timm", "/data/backbone.safetensors", None]):
        config = tiny_config(epochs=1, backbone_weights=source)
        train(config, cache, tmp_path / str(i), device="cpu")
    train(tiny_config(epochs=2, backbone_weights="timm"), cache, tmp_path / "0", resume=True, device="cpu")
    assert sources == ["timm:maxvit_rmlp_pico_rw_256", "/data/backbone.safetensors"]
