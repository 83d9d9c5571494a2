"""Checkpoints that are interrupted at any call, or damaged at any byte."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil

import pytest
import torch
from test_checkpoint import CLASSES, CONFIG, RECIPE, is_whole, model_at, save

from simmp_fast.config import ConfigError
from simmp_fast.data.errors import DataError
from simmp_fast.training import checkpoint
from simmp_fast.training.checkpoint import (
    Metadata,
    go_back,
    load_last,
    load_model,
    load_previous,
    previous_step,
    read_weights,
    save_weights,
)
from simmp_fast.training.errors import TrainingError

CALLS = [(os, "replace"), (os, "fsync"), (os, "open"), (os, "link"), (torch, "save"), (checkpoint, "write_sealed")]


def failing(monkeypatch, place, name, call, error, *, after):
    """Raise `error` before or after call number `call`; returns the list of calls."""
    plain, calls = getattr(place, name), []

    def broken(*arguments, **keywords):
        calls.append(1)
        if len(calls) == call and not after:
            raise error
        result = plain(*arguments, **keywords)
        if len(calls) == call:
            raise error
        return result

    monkeypatch.setattr(place, name, broken)
    return calls


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()], ids=["EIO", "Ctrl-C"])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(("place", "name"), CALLS, ids=[name for _, name in CALLS])
def test_a_failure_at_any_call_leaves_a_whole_checkpoint(tmp_path, monkeypatch, place, name, after, error):
    save(tmp_path, 1)
    save(tmp_path, 2)
    step, seen = 2, []
    for call in itertools.count(1):
        with monkeypatch.context() as patch:
            calls = failing(patch, place, name, call, error, after=after)
            with contextlib.suppress(TrainingError, KeyboardInterrupt):
                save(tmp_path, step + 1)
        assert read_weights(tmp_path / "last.safetensors")
        found = load_last(tmp_path)
        assert is_whole(found)
        assert found[2].step in (step, step + 1)
        seen.append(found[2].step - step)
        assert is_whole(load_previous(tmp_path))
        step = found[2].step
        if len(calls) < call:
            break
    assert seen[-1] == 1
    assert is_whole(load_previous(tmp_path))


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()], ids=["EIO", "Ctrl-C"])
def test_a_save_after_one_that_failed_between_the_renames(tmp_path, monkeypatch, error):
    """The weights of the checkpoint still wait as pending ones, and are not written over."""
    save(tmp_path, 1)
    save(tmp_path, 2)
    with monkeypatch.context() as patch:
        calls = failing(patch, os, "replace", 6, error, after=False)
        with pytest.raises((TrainingError, KeyboardInterrupt)):
            save(tmp_path, 3)
    assert len(calls) == 6
    assert read_weights(tmp_path / "last.safetensors")[1].step == 2
    with monkeypatch.context() as patch:
        failing(patch, checkpoint, "write_sealed", 1, OSError(28, "No space left on device"), after=False)
        with pytest.raises(TrainingError, match="No space left"):
            save(tmp_path, 4)
    assert is_whole(load_last(tmp_path))
    assert load_last(tmp_path)[2].step == 3


def test_the_checkpoint_before_stays(tmp_path, monkeypatch):
    for step in (3, 5, 8):
        save(tmp_path, step)
    assert is_whole(load_previous(tmp_path))
    assert (load_previous(tmp_path)[2].step, load_last(tmp_path)[2].step) == (5, 8)
    save(tmp_path, 8)  # as when a run is interrupted right after it saved
    assert previous_step(tmp_path) == 5
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(95, "Operation not supported")))
    save(tmp_path, 9)
    assert is_whole(load_previous(tmp_path))
    assert previous_step(tmp_path) == 8


@pytest.mark.parametrize("times", [1, 2])
def test_going_back(tmp_path, times):
    for step in (3, 5, 8):
        save(tmp_path, step)
    for _ in range(times):
        go_back(tmp_path)
    assert is_whole(load_last(tmp_path))
    assert load_last(tmp_path)[2].step == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "last.safetensors", "last.state.pt", "previous.safetensors", "previous.state.pt",
    ]  # fmt: skip
    save(tmp_path, 6)
    assert (previous_step(tmp_path), load_last(tmp_path)[2].step) == (5, 6)


@pytest.mark.parametrize("name", ["replace", "fsync", "open"])
def test_going_back_may_fail_at_any_call(tmp_path, monkeypatch, name):
    for step in (3, 5):
        save(tmp_path, step)
    for call in range(1, 9):
        with monkeypatch.context() as patch:
            failing(patch, os, name, call, KeyboardInterrupt(), after=False)
            try:
                go_back(tmp_path)
            except KeyboardInterrupt:
                assert is_whole(load_last(tmp_path))
                assert previous_step(tmp_path) == 3
    assert load_last(tmp_path)[2].step == 3


def test_previous_files_of_two_checkpoints_do_not_mix(tmp_path):
    for step in (3, 5, 8):
        save(tmp_path, step)
    shutil.copy(tmp_path / "last.state.pt", tmp_path / "previous.state.pt")
    with pytest.raises(
        DataError, match=r"previous.state.pt: damaged, or of a checkpoint other than previous.safetensors"
    ):
        load_previous(tmp_path)
    assert previous_step(tmp_path) is None


@pytest.mark.parametrize("name", ["last.safetensors", "last.state.pt"])
def test_a_missing_file_is_named_with_the_way_out(tmp_path, name):
    save(tmp_path, 3)
    (tmp_path / name).rename(tmp_path / "away")
    with pytest.raises(
        DataError, match=rf"{name}: (missing|no such file).*restore it, or start a run in another folder"
    ):
        load_last(tmp_path)
    (tmp_path / "away").rename(tmp_path / name)
    save(tmp_path, 4)
    (tmp_path / name).unlink()
    with pytest.raises(DataError, match=rf"{name}: .*the checkpoint before it, of step 3: --resume previous"):
        load_last(tmp_path)


def flip(path, position: float, bit: int) -> None:
    """Flip a bit; `position` is a byte, or a share of the file where it is below 1."""
    content = bytearray(path.read_bytes())
    content[int(position if position >= 1 or position == 0 else position * len(content))] ^= 1 << bit
    path.write_bytes(bytes(content))


# The length of the header, the header (some 2,000 bytes), and the tensors.
PLACES = [0, 1, 2, 7, 8, 9, *range(12, 900, 37), 0.5, 0.8, 0.97, 0.999]


@pytest.mark.parametrize("bit", [0, 5, 7])
def test_a_flipped_bit_in_weights_is_seen(tmp_path, bit):
    for step in (3, 5):
        save(tmp_path, step)
    whole = (tmp_path / "last.safetensors").read_bytes()
    for place in PLACES:
        flip(tmp_path / "last.safetensors", place, bit)
        with pytest.raises(DataError, match=r"last.safetensors: .*damaged.*--resume previous"):
            load_last(tmp_path)
        with pytest.raises(DataError, match=r"last.safetensors: .*damaged"):
            load_model(tmp_path / "last.safetensors")
        (tmp_path / "last.safetensors").write_bytes(whole)
    assert is_whole(load_last(tmp_path))


@pytest.mark.filterwarnings("error")  # a file that lost its checksum must not pass for one that never had any
def test_a_flipped_bit_in_the_names_of_the_checksum_is_seen(tmp_path):
    save(tmp_path, 5)
    whole = (tmp_path / "last.safetensors").read_bytes()
    for word in (b'"sha256"', b'"sealed"', b"__metadata__", b'"model"', b'"pair"'):
        for offset in range(len(word)):
            flip(tmp_path / "last.safetensors", whole.index(word) + offset, 1)
            with pytest.raises(DataError, match=r"last.safetensors: .*damaged"):
                read_weights(tmp_path / "last.safetensors")
            (tmp_path / "last.safetensors").write_bytes(whole)


@pytest.mark.parametrize("place", [0, 30, 200, 0.3, 0.6, 0.9, 0.999])
def test_a_flipped_bit_in_the_state_is_seen(tmp_path, place):
    for step in (3, 5):
        save(tmp_path, step)
    flip(tmp_path / "last.state.pt", place, 4)
    with pytest.raises(DataError, match=r"last.state.pt: damaged.*of step 3: --resume previous"):
        load_last(tmp_path)
    go_back(tmp_path)
    assert load_last(tmp_path)[2].step == 3


def test_weights_that_are_not_finite_are_not_used(tmp_path):
    model = model_at(1)
    with torch.no_grad():
        model.heads[0].weight[0, 0] = float("nan")
    save_weights(tmp_path / "best.safetensors", model, Metadata(CONFIG.model, CLASSES, 1, 1, RECIPE))
    with pytest.raises(ConfigError, match=r"best.safetensors: heads.0.weight: got 1 of 18 values that are not finite"):
        load_model(tmp_path / "best.safetensors")


def test_nothing_is_written_where_the_folder_was(tmp_path):
    (tmp_path / "run").mkdir()
    save(tmp_path / "run", 1)
    (tmp_path / "run").rename(tmp_path / "moved")
    with pytest.raises(TrainingError, match=r"run: the folder was moved or removed"):
        save(tmp_path / "run", 2)
    assert not (tmp_path / "run").exists()
