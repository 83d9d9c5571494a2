"""Checkpoints of a run: weights as safetensors, and beside `last` the training state that belongs to them.

Each file is written under a temporary name, synced and renamed, so it is complete or absent. `last` is two files, and
a process can die between two renames; so the new weights first wait, complete, as `last.pending.safetensors`, then
the state is renamed into place, and then the weights. The rename of the state is the moment the checkpoint changes:
a reader that finds older weights beside a newer state takes the pending ones. Weights name their state by its SHA-256
(`pair`), and carry a checksum of themselves, so a flipped bit in either file is seen.
At any moment `last.safetensors` alone is a complete, if perhaps older, set of weights.

The checkpoint before the last stays as `previous`, the same two files under other names: `last` may already hold the
step that a run diverges from. It is put in place in the same way.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from simmp_fast.config import Config, ConfigError, ModelConfig, from_mapping, to_mapping
from simmp_fast.data.errors import DataError, reading
from simmp_fast.differences import differences, listed
from simmp_fast.files import atomic_file, link_or_copy, new_file, sha256, sync
from simmp_fast.messages import shown, why_no_file
from simmp_fast.model import SimMPNet
from simmp_fast.model.pretrained import load_strict
from simmp_fast.model.sealing import check_finite, in_header, read_sealed, write_sealed
from simmp_fast.training.errors import TrainingError

WEIGHTS, PENDING, STATE = "last.safetensors", "last.pending.safetensors", "last.state.pt"
PREVIOUS, PREVIOUS_STATE = "previous.safetensors", "previous.state.pt"
_PREVIOUS_PENDING = "previous.pending.safetensors"
# Weights, pending weights and state of each of the two checkpoints that are two files.
_LAST, _BEFORE = (WEIGHTS, PENDING, STATE), (PREVIOUS, _PREVIOUS_PENDING, PREVIOUS_STATE)
# What the files of checkpoints in a run folder are called.
_PATTERNS = (WEIGHTS, STATE, PREVIOUS, PREVIOUS_STATE, "best.safetensors", "epoch_*.safetensors")


@dataclass(frozen=True)
class Metadata:
    """What a weights file says of itself.

    Attributes:
        model: configuration of the network.
        classes: names of the classes, background first.
        step: training steps taken.
        epoch: epochs completed.
        recipe: how files become input for the network, as in `data.json`; None where that is not known.
        pair: SHA-256 of the training state that belongs to the weights; empty for weights without one.
    """

    model: ModelConfig
    classes: tuple[str, ...]
    step: int
    epoch: int
    recipe: Mapping[str, Any] | None = None
    pair: str = ""


@dataclass(frozen=True)
class TrainingState:
    """Where a run stands, beside the model's weights and buffers, and what it was made with.

    Attributes:
        step: training steps taken since the beginning.
        epoch: the epoch to go on with (0-based).
        batch: batches of that epoch already taken.
        loss_sum: sum of their losses.
        best: best validation Dice so far; None before the first validation.
        metrics_bytes: length of `metrics.jsonl` at this point.
        metrics_sha256: checksum of those bytes.
        optimizer: the optimiser's `state_dict`.
        rng: states of the random number generators (`rng.capture`).
        config: the resolved configuration.
        records: contents of `data.json` and `splits.json`, by file name.
        environment: versions, devices and threads (`environment.environment`).
    """

    step: int
    epoch: int
    batch: int
    loss_sum: float
    best: float | None
    metrics_bytes: int
    metrics_sha256: str
    optimizer: dict[str, Any]
    rng: dict[str, Any]
    config: dict[str, Any]
    records: dict[str, dict[str, Any]]
    environment: dict[str, Any]


_COUNTS, _TABLES = ("step", "epoch", "batch", "metrics_bytes"), ("optimizer", "rng", "config", "records", "environment")
_KINDS = {"loss_sum": float, "metrics_sha256": str, **dict.fromkeys(_COUNTS, int), **dict.fromkeys(_TABLES, dict)}
Checkpoint = tuple[dict[str, Tensor], Metadata, TrainingState]


def save_weights(path: Path, model: nn.Module, meta: Metadata) -> None:
    """Write the model's complete state (weights, memory, counters) to one safetensors file, atomically.

    Raises:
        TrainingError: the file cannot be written; whatever was there before is untouched.
    """
    header = {
        "format": "pt",
        "model": json.dumps(to_mapping(meta.model)),
        "classes": json.dumps(meta.classes),
        "recipe": json.dumps(meta.recipe),
        "step": str(meta.step),
        "epoch": str(meta.epoch),
        "pair": meta.pair,
    }
    tensors = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    with _write_errors(path), atomic_file(path, make_parents=False) as temporary:
        write_sealed(temporary, tensors, header)


def save_last(folder: Path, model: nn.Module, meta: Metadata, state: TrainingState) -> None:
    """Write `last.safetensors` and `last.state.pt` as one checkpoint; the one before it becomes `previous`.

    `meta.pair` is chosen here.

    Raises:
        TrainingError: the disk is full or a file cannot be written; the folder holds a whole checkpoint all the same.
    """
    _settle(folder, _LAST)
    pending = folder / PENDING
    try:
        with _write_errors(folder / STATE), new_file(folder / STATE) as written:
            torch.save(vars(state), written)
            save_weights(pending, model, replace(meta, pair=sha256(written)))
            if _step(folder / WEIGHTS) not in (None, meta.step):  # of two saved at one step neither is before the other
                _keep(folder)
    except BaseException:
        pending.unlink(missing_ok=True)
        raise
    _take_place(folder, written, _LAST)


def go_back(folder: Path) -> None:
    """Make `previous` the last checkpoint of a locked run folder, in the same steps as `save_last`.

    Raises:
        TrainingError: a file cannot be written.
    """
    _settle(folder, _LAST)
    _settle(folder, _BEFORE)
    with _write_errors(folder / STATE), new_file(folder / STATE) as written:
        shutil.copyfile(folder / PREVIOUS_STATE, written)
        with atomic_file(folder / PENDING, make_parents=False) as temporary:
            shutil.copyfile(folder / PREVIOUS, temporary)
    _take_place(folder, written, _LAST)


def _keep(folder: Path) -> None:
    """Make the last checkpoint the one before the last, which it then is under both names."""
    _settle(folder, _BEFORE)
    if (folder / PREVIOUS_STATE).exists() and (folder / PREVIOUS_STATE).samefile(folder / STATE):
        return
    with atomic_file(folder / _PREVIOUS_PENDING, make_parents=False) as temporary:
        link_or_copy(folder / WEIGHTS, temporary)
    with new_file(folder / PREVIOUS_STATE) as written:
        link_or_copy(folder / STATE, written)
    _take_place(folder, written, _BEFORE)


def _take_place(folder: Path, new_state: Path, names: tuple[str, str, str]) -> None:
    """Rename a new state and the pending weights into place. Once the state is, nothing is removed, come what may."""
    weights, pending, state = (folder / name for name in names)
    with _write_errors(state, "the run folder holds a whole checkpoint all the same"):
        try:
            os.replace(new_state, state)
        except BaseException:
            if new_state.exists():  # still under its temporary name: the checkpoint before is untouched
                new_state.unlink()
                pending.unlink(missing_ok=True)
            raise
        sync(folder)  # so that the disk sees the renames in this order
        os.replace(pending, weights)
        sync(folder)


def _settle(folder: Path, names: tuple[str, str, str]) -> None:
    """Finish what a process left that died, or failed, between the two renames of `_take_place`."""
    weights, pending, state = (folder / name for name in names)
    if not (pending.exists() and state.exists()):
        return
    try:
        _, meta = read_weights(pending)
    except DataError:
        return  # damaged; whether it is needed is seen when the checkpoint is read
    with _write_errors(state):
        if meta.pair == sha256(state):
            os.replace(pending, weights)


def _step(path: Path) -> int | None:
    """The step that a weights file was saved at, from its header alone; None if there is none to be read."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return int((file.metadata() or {})["step"])
    except (SafetensorError, OSError, KeyError, ValueError):
        return None


def load_last(folder: Path) -> Checkpoint | None:
    """The newest checkpoint of a locked run folder, on the CPU; None if there are no files of a checkpoint.

    Raises:
        DataError: a file is missing or damaged, or the two belong to different checkpoints; says what can be done.
    """
    if not (folder / STATE).exists():
        if found := checkpoint_files(folder):
            way = _way_back(folder)
            raise DataError(f"{folder / STATE}: missing, while {', '.join(found)} of the run are there: {way}")
        return None
    _settle(folder, _LAST)
    try:
        checkpoint = _load(folder / WEIGHTS, folder / STATE)
    except DataError as error:
        raise DataError(f"{error}: {_way_back(folder)}") from None
    (folder / PENDING).unlink(missing_ok=True)
    return checkpoint


def load_previous(folder: Path) -> Checkpoint:
    """The checkpoint before the last of a locked run folder, on the CPU.

    Raises:
        DataError: there is none, a file is damaged, or the two belong to different checkpoints.
    """
    _settle(folder, _BEFORE)
    return _load(folder / PREVIOUS, folder / PREVIOUS_STATE)


def checkpoint_files(folder: Path) -> list[str]:
    """Names of the files of checkpoints in a run folder. Pending weights alone are of a first one that never was."""
    return sorted(path.name for pattern in _PATTERNS for path in folder.glob(pattern))


def previous_step(folder: Path) -> int | None:
    """The step of the checkpoint before the last, if it can be resumed from."""
    try:
        return load_previous(folder)[2].step
    except DataError:
        return None


def _way_back(folder: Path) -> str:
    step = previous_step(folder)
    if step is None:
        return "restore it, or start a run in another folder"
    return f"restore it, or go on from the checkpoint before it, of step {step}: --resume previous"


def _load(weights: Path, state: Path) -> Checkpoint:
    tensors, meta = read_weights(weights)
    if why := why_no_file(state):
        raise DataError(f"{state}: {why}")
    with reading(state):
        found = sha256(state)
    if found != meta.pair:
        expected = f"{meta.pair[:12]} of the state that {weights.name} was saved with" if meta.pair else "none"
        raise DataError(
            f"{state}: damaged, or of a checkpoint other than {weights.name}: got SHA-256 {found[:12]}, expected "
            f"{expected}"
        )
    return tensors, meta, read_state(state)


def read_state(path: Path) -> TrainingState:
    """The training state in a file, on the CPU.

    Raises:
        DataError: it cannot be read.
    """
    try:
        state = TrainingState(**torch.load(path, map_location="cpu", weights_only=True))
        if wrong := [name for name, kind in _KINDS.items() if not isinstance(getattr(state, name), kind)]:
            raise TypeError(wrong)
        return state
    except MemoryError:
        raise
    except Exception as error:  # damaged pickles raise whatever their reader stumbles over
        raise DataError(f"{path}: truncated or damaged, no training state ({type(error).__name__})") from error


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], Metadata]:
    """The tensors (on the CPU) and the metadata of a weights file written by `save_weights`.

    Raises:
        DataError: the file is missing, truncated, damaged, or was not written by this package; names it.
    """
    path = Path(path)
    tensors, header = read_sealed(path, DataError)
    if missing := {"model", "classes", "step", "epoch"} - header.keys():
        raise DataError(
            f"{path}: got safetensors without {', '.join(sorted(missing))} in the header, expected a checkpoint"
        )
    content, classes, recipe = (in_header(path, header, key, DataError) for key in ("model", "classes", "recipe"))
    model = from_mapping(ModelConfig, content, f"{path}: model")
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise DataError(f"{path}: classes: got {shown(classes)} in the header, expected the names of classes")
    if not isinstance(recipe, dict | None):
        raise DataError(f"{path}: recipe: got {shown(recipe)} in the header, expected a recipe of data")
    try:
        step, epoch = int(header["step"]), int(header["epoch"])
    except ValueError as error:
        raise DataError(f"{path}: got a header that is no checkpoint's ({error}), expected a checkpoint") from None
    return tensors, Metadata(model, tuple(classes), step, epoch, recipe, header.get("pair", ""))


def load_model(path: str | Path, backend: str = "auto") -> tuple[SimMPNet, Metadata]:
    """The network in a weights file of a run, in evaluation mode on the CPU.

    Raises:
        DataError: the file cannot be used; see `read_weights`.
        ConfigError: its tensors do not fit its configuration, or hold values that are not finite.
    """
    tensors, meta = read_weights(path)
    check_finite(tensors, path)
    model = SimMPNet(meta.model, backend=backend)
    load_strict(model, tensors, str(path))
    return model.eval(), meta


def check_model_config(path: str | Path, saved: ModelConfig, expected: ModelConfig) -> None:
    """Raise `ConfigError` that lists the keys in which a checkpoint's network differs from the one asked for."""
    one, other = (to_mapping(Config(model=model)) for model in (saved, expected))
    if found := differences(one, other):
        raise ConfigError(f"{path}: checkpoint of another network: {listed(found)}")


@contextmanager
def _write_errors(path: Path, rest: str = "the one before it is untouched") -> Iterator[None]:
    try:
        yield
    except TrainingError:
        raise
    except (OSError, SafetensorError, RuntimeError) as error:
        if not path.parent.is_dir():
            raise TrainingError(
                f"{path.parent}: the folder was moved or removed; its last checkpoint went with it"
            ) from error
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        way_out = "Free some space" if full else "Mend that"
        raise TrainingError(
            f"{path}: the checkpoint could not be written ({reason}); {rest}. {way_out}, then resume the run"
        ) from error
