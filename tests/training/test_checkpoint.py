from __future__ import annotations

import os
import random
import resource

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from training_stubs import TinyModel, tiny_config

from simmp_fast.config import ConfigError, to_mapping
from simmp_fast.data.errors import DataError
from simmp_fast.messages import Note
from simmp_fast.training import checkpoint, rng
from simmp_fast.training.checkpoint import Metadata, TrainingState, load_last, read_weights, save_last, save_weights
from simmp_fast.training.errors import TrainingError
from simmp_fast.training.step import make_optimizer

CONFIG = tiny_config()
CLASSES = ("background", "disc", "square")
RECIPE = {"name": "shapes", "classes": list(CLASSES)}


def model_at(step: int) -> TinyModel:
    torch.manual_seed(step)
    return TinyModel(CONFIG.model)


def state_at(step: int, model: TinyModel) -> TrainingState:
    optimizer = make_optimizer(model, CONFIG.train)
    return TrainingState(
        step=step, epoch=1, batch=2, loss_sum=0.1, best=None, metrics_bytes=0, metrics_sha256="",
        optimizer=optimizer.state_dict(), rng=rng.capture(), config=to_mapping(CONFIG), records={}, environment={},
    )  # fmt: skip


def save(folder, step: int) -> None:
    model = model_at(step)
    save_last(folder, model, Metadata(CONFIG.model, CLASSES, step, 1, RECIPE), state_at(step, model))


def is_whole(checkpoint) -> bool:
    tensors, meta, state = checkpoint
    expected = model_at(state.step).state_dict()
    return meta.step == state.step and all(torch.equal(tensors[name], value) for name, value in expected.items())


def names(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_round_trip(tmp_path):
    save(tmp_path, 7)
    tensors, meta, state = load_last(tmp_path)
    expected = model_at(7).state_dict()
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[n], expected[n]) for n in expected)
    assert (meta.model, meta.classes, meta.step, meta.epoch) == (CONFIG.model, CLASSES, 7, 1)
    assert meta.recipe == RECIPE
    assert state.config == to_mapping(CONFIG)
    assert (state.step, state.epoch, state.batch, state.loss_sum, state.best) == (7, 1, 2, 0.1, None)
    assert names(tmp_path) == {"last.safetensors", "last.state.pt"}
    assert load_file(tmp_path / "last.safetensors").keys() == expected.keys()  # any safetensors reader will do


def test_no_checkpoint_yet(tmp_path):
    assert load_last(tmp_path) is None


@pytest.mark.parametrize("operation", ["replace", "fsync"])
def test_killed_at_any_write_leaves_one_whole_checkpoint(tmp_path, operation):
    save(tmp_path, 1)
    seen = []
    for stop_at in range(1, 12):
        pid = os.fork()
        if pid == 0:  # dies like a killed process, without clean-up, at its n-th rename or sync
            plain, calls = getattr(os, operation), 0

            def dying(*arguments, plain=plain, stop_at=stop_at):
                nonlocal calls
                calls += 1
                if calls == stop_at:
                    os._exit(9)
                return plain(*arguments)

            setattr(os, operation, dying)
            save(tmp_path, seen[-1] + 1 if seen else 2)
            os._exit(0)
        survived = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert read_weights(tmp_path / "last.safetensors")  # readable even before a resumed run settles it
        tensors, meta, state = load_last(tmp_path)
        assert meta.step == state.step
        assert all(torch.equal(tensors[n], v) for n, v in model_at(state.step).state_dict().items())
        seen.append(state.step)
        if survived:
            break
    assert survived
    assert len(set(seen)) >= 2  # some children died before the switch, some after it


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path):
    save(tmp_path, 1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    sizes = sorted(len(content) for content in before.values())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for room in (0, sizes[0] // 2, sizes[0] + 1):  # not one file fits, half of the smaller, the smaller but not both
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        try:
            with pytest.raises(TrainingError, match=r"could not be written \(.*\); the one before it is untouched"):
                save(tmp_path, 2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert load_last(tmp_path)[2].step == 1


def test_no_space_is_said_in_plain_words(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(TrainingError, match=r"best\.safetensors: .*No space left on device"):
        save_weights(tmp_path / "best.safetensors", model_at(1), Metadata(CONFIG.model, CLASSES, 1, 0))
    assert names(tmp_path) == set()


@pytest.mark.parametrize("name", ["last.safetensors", "last.state.pt"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_truncated_file_is_named(tmp_path, name, share):
    save(tmp_path, 1)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: int(share * len(content))])
    with pytest.raises(DataError, match=rf"{name}: .*damaged"):
        load_last(tmp_path)


def test_files_of_different_checkpoints_do_not_mix(tmp_path):
    save(tmp_path, 1)
    weights = (tmp_path / "last.safetensors").read_bytes()
    save(tmp_path, 2)
    (tmp_path / "last.safetensors").write_bytes(weights)
    match = r"last.state.pt: damaged, or of a checkpoint other than last.safetensors: got SHA-256"
    with pytest.raises(DataError, match=match):
        load_last(tmp_path)


def test_another_network_is_named_by_its_keys(tmp_path):
    save(tmp_path, 1)
    _, meta = read_weights(tmp_path / "last.safetensors")
    other = tiny_config().model.__class__(**{**vars(CONFIG.model), "clusters": 5, "feature_dim": 16})
    with pytest.raises(
        ConfigError, match=r"another network: model\.clusters is 5, saved as 3; model\.feature_dim is 16"
    ):
        checkpoint.check_model_config("model.safetensors", meta.model, other)


def test_missing_and_foreign_files(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(DataError, match="none.safetensors: no such file"):
        read_weights(tmp_path / "none.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with (
        pytest.warns(Note, match="holds no checksum"),
        pytest.raises(DataError, match="without classes, epoch, model, step in the header"),
    ):
        read_weights(tmp_path / "foreign.safetensors")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model", "{", "model: got '{' in the header, expected JSON"),
        ("model", "[" * 9999, "model: got '.*' in the header, expected JSON"),
        ("model", "[]", "model: got"),
        ("classes", "3", "classes: got 3 in the header, expected the names of classes"),
        ("classes", "abc", "classes: got 'abc' in the header, expected JSON"),
        ("step", "many", "a header that is no checkpoint's"),
        ("epoch", "", "a header that is no checkpoint's"),
        ("recipe", "[]", r"recipe: got \[\] in the header, expected a recipe"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*no checksum")
def test_a_header_of_something_else_is_named(tmp_path, key, value, message):
    from safetensors.torch import save_file

    good = {"model": "{}", "classes": '["a"]', "step": "1", "epoch": "0", "pair": ""}
    save_file({"a": torch.zeros(1)}, tmp_path / "last.safetensors", good)
    assert read_weights(tmp_path / "last.safetensors")[1].classes == ("a",)
    save_file({"a": torch.zeros(1)}, tmp_path / "last.safetensors", good | {key: value})
    with pytest.raises((DataError, ConfigError), match=rf"last.safetensors: {message}|last.safetensors: got {message}"):
        read_weights(tmp_path / "last.safetensors")


@pytest.mark.parametrize("content", [bytes(range(7, 90)), b"\xff" * 7 + b"\x0f{}", (2).to_bytes(8, "little") + b"[]"])
@pytest.mark.parametrize("name", ["last.state.pt", "last.safetensors"])
def test_damaged_contents_are_named(tmp_path, content, name):
    save(tmp_path, 1)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}: .*damaged"):
        load_last(tmp_path)


def draw() -> tuple[float, float, float, float]:
    legacy = np.random  # the global generator
    return random.random(), legacy.normal(), legacy.uniform(), torch.rand(1).item()


def test_random_states_come_back():
    rng.seed_all(3)
    states = rng.capture()
    first = draw()
    rng.restore(states)
    assert draw() == first


def test_load_model(tmp_path):
    from simmp_fast.model import SimMPNet

    torch.manual_seed(0)
    model = SimMPNet(CONFIG.model, backend="reference")
    save_weights(tmp_path / "best.safetensors", model, Metadata(CONFIG.model, CLASSES, 5, 1))
    loaded, meta = checkpoint.load_model(tmp_path / "best.safetensors", backend="reference")
    assert (meta.step, loaded.training) == (5, False)
    image = torch.rand(1, 1, 64, 64)
    assert all(torch.equal(a, b) for a, b in zip(model.eval()(image), loaded(image), strict=True))


@pytest.mark.parametrize(("name", "value"), [("step", "7"), ("records", []), ("rng", None), ("loss_sum", "x")])
def test_a_state_of_other_kinds_is_refused(tmp_path, name, value):
    torch.save({**vars(state_at(1, model_at(1))), name: value}, tmp_path / "last.state.pt")
    with pytest.raises(DataError, match=r"last.state.pt: truncated or damaged, no training state"):
        checkpoint.read_state(tmp_path / "last.state.pt")
