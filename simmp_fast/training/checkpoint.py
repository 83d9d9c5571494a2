"""Checkpoints of a run: weights as safetensors, and beside `last` the training state that belongs to them.

Each file is written under a temporary name, synced and renamed, so it is complete or absent. `last` is two files, and
a process can die between two renames; so the new weights first wait, complete, as `last.pending.safetensors`, then
the state is renamed into place, and then the weights. The rename of the state is the moment the checkpoint changes:
a reader that finds older weights beside a newer state takes the pending ones. Both carry the same random `pair` name.
At any moment `last.safetensors` alone is a complete, if perhaps older, set of weights.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from simmp_fast.config import Config, ConfigError, ModelConfig, from_mapping, to_mapping
from simmp_fast.data.errors import DataError
from simmp_fast.files import atomic_file
from simmp_fast.model import SimMPNet
from simmp_fast.model.pretrained import load_strict
from simmp_fast.training.errors import TrainingError
from simmp_fast.training.run_folder import differing_keys, listed_differences

WEIGHTS, PENDING, STATE = "last.safetensors", "last.pending.safetensors", "last.state.pt"


@dataclass(frozen=True)
class Metadata:
    """What a weights file says of itself.

    Attributes:
        model: configuration of the network.
        classes: names of the classes, background first.
        step: training steps taken.
        epoch: epochs completed.
        pair: name shared with the training state; empty for weights without one.
    """

    model: ModelConfig
    classes: tuple[str, ...]
    step: int
    epoch: int
    pair: str = ""


@dataclass(frozen=True)
class TrainingState:
    """Where a run stands, beside the model's weights and buffers.

    Attributes:
        step: training steps taken since the beginning.
        epoch: the epoch to go on with (0-based).
        batch: batches of that epoch already taken.
        loss_sum: sum of their losses.
        best: best validation Dice so far; None before the first validation.
        metrics_bytes: length of `metrics.jsonl` at this point.
        optimizer: the optimiser's `state_dict`.
        rng: states of the random number generators (`rng.capture`).
    """

    step: int
    epoch: int
    batch: int
    loss_sum: float
    best: float | None
    metrics_bytes: int
    optimizer: dict[str, Any]
    rng: dict[str, Any]


def save_weights(path: Path, model: nn.Module, meta: Metadata) -> None:
    """Write the model's complete state (weights, memory, counters) to one safetensors file, atomically.

    Raises:
        TrainingError: the file cannot be written; whatever was there before is untouched.
    """
    header = {
        "format": "pt",
        "model": json.dumps(to_mapping(meta.model)),
        "classes": json.dumps(meta.classes),
        "step": str(meta.step),
        "epoch": str(meta.epoch),
        "pair": meta.pair,
    }
    tensors = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    with _write_errors(path), atomic_file(path) as temporary:
        save_file(tensors, temporary, header)


def save_last(folder: Path, model: nn.Module, meta: Metadata, state: TrainingState) -> None:
    """Write `last.safetensors` and `last.state.pt` as one checkpoint. `meta.pair` is chosen here.

    Raises:
        TrainingError: the disk is full or a file cannot be written; the checkpoint before is untouched.
    """
    pair = secrets.token_hex(8)
    pending = folder / PENDING
    try:
        save_weights(pending, model, Metadata(meta.model, meta.classes, meta.step, meta.epoch, pair))
        with _write_errors(folder / STATE), atomic_file(folder / STATE) as temporary:
            torch.save({"pair": pair, **vars(state)}, temporary)
    except BaseException:
        pending.unlink(missing_ok=True)
        raise
    os.replace(pending, folder / WEIGHTS)


def load_last(folder: Path) -> tuple[dict[str, Tensor], Metadata, TrainingState] | None:
    """The newest checkpoint of a locked run folder, on the CPU; None if none was written yet.

    Raises:
        DataError: a file is truncated, or the two belong to different checkpoints.
    """
    if not (folder / STATE).exists():
        (folder / PENDING).unlink(missing_ok=True)
        return None
    pair, state = _read_state(folder / STATE)
    if not _has_pair(folder / WEIGHTS, pair):
        if not _has_pair(folder / PENDING, pair):
            raise DataError(f"{folder}: {WEIGHTS} and {STATE} belong to different checkpoints")
        os.replace(folder / PENDING, folder / WEIGHTS)
    (folder / PENDING).unlink(missing_ok=True)
    tensors, meta = read_weights(folder / WEIGHTS)
    return tensors, meta, state


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], Metadata]:
    """The tensors (on the CPU) and the metadata of a weights file written by `save_weights`.

    Raises:
        DataError: the file is missing, truncated, or was not written by this package; names it.
    """
    path = Path(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except FileNotFoundError:
        raise DataError(f"{path}: no such checkpoint") from None
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path}: truncated or damaged checkpoint, no readable safetensors file ({error})") from None
    try:
        model = from_mapping(ModelConfig, json.loads(header["model"]), f"{path}: model")
        classes = json.loads(header["classes"])
        if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
            raise DataError(f"{path}: got {header['classes']!r:.200} in the header, expected the names of classes")
        return tensors, Metadata(model, tuple(classes), int(header["step"]), int(header["epoch"]), header["pair"])
    except KeyError as error:
        raise DataError(f"{path}: got safetensors without {error} in the header, expected a checkpoint") from None
    except (ConfigError, DataError):
        raise
    except ValueError as error:
        raise DataError(f"{path}: got a header that is no checkpoint's ({error}), expected a checkpoint") from None


def load_model(path: str | Path, backend: str = "auto") -> tuple[SimMPNet, Metadata]:
    """The network in a weights file of a run, in evaluation mode on the CPU.

    Raises:
        DataError: the file cannot be used; see `read_weights`.
        ConfigError: its tensors do not fit its configuration.
    """
    tensors, meta = read_weights(path)
    model = SimMPNet(meta.model, backend=backend)
    load_strict(model, tensors, str(path))
    return model.eval(), meta


def check_model_config(path: str | Path, saved: ModelConfig, expected: ModelConfig) -> None:
    """Raise `ConfigError` that lists the keys in which a checkpoint's network differs from the one asked for."""
    one, other = Config(model=saved), Config(model=expected)
    if keys := differing_keys(one, other):
        raise ConfigError(f"{path}: checkpoint of another network: {listed_differences(keys, one, other)}")


def _read_state(path: Path) -> tuple[str, TrainingState]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        return content.pop("pair"), TrainingState(**content)
    except MemoryError:
        raise
    except Exception as error:  # damaged pickles raise whatever their reader stumbles over
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path}: truncated or damaged training state ({reason})") from None


def _has_pair(path: Path, pair: str) -> bool:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return bool((file.metadata() or {}).get("pair") == pair)
    except FileNotFoundError:
        return False
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path}: truncated or damaged checkpoint, no readable safetensors file ({error})") from None


@contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise TrainingError(
            f"{path}: the checkpoint could not be written ({reason}); the one before it is untouched. "
            "Free some space, then resume the run"
        ) from error
