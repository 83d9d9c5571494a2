"""Weights and configuration of a network in a folder: ``config.json`` beside ``model.safetensors``.

The weights hold the configuration and a checksum too, so files that do not belong together, or are damaged, are seen.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..config import ConfigError, ModelConfig, from_mapping, read_json, to_mapping
from ..differences import differences, listed
from ..files import link_or_copy, remove_tree, sync, temporary_name
from ..folders import UnfinishedError, atomic_folder, finish_folder, others
from .memory import MemoryBank
from .sealing import check_finite, in_header, read_sealed, write_sealed

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


def _is_folder_name(source: str | os.PathLike[str]) -> bool:
    """Whether `source` can only be meant as a folder: a name on the Hub is ``name`` or ``owner/name``."""
    if not isinstance(source, str):
        return True
    owner, *rest = source.split("/")
    odd = source.startswith((".", "~", "/")) or "\\" in source or bool(re.match("[A-Za-z]:", source))
    return odd or os.path.exists(source) or len(rest) > 1 or rest == [""] or (len(rest) == 1 and os.path.isdir(owner))


def _locate(source: str | os.PathLike[str], name: str, download: Mapping[str, Any]) -> Path:
    """The path of file `name` in a folder, or in the local copy of a repository on the Hub."""
    if os.path.isdir(source):
        path = Path(source) / name
        if not path.is_file():
            raise ConfigError(f"{path}: no such file; expected a folder written by save_pretrained")
        return path
    if _is_folder_name(source):
        raise ConfigError(f"{source}: no such folder; expected one written by save_pretrained")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(hf_hub_download(str(source), name, **download))
    except (OSError, ValueError, EntryNotFoundError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(
            f"{source}: no such folder, and {name} of a repository of that name cannot be had from the Hugging Face "
            f"Hub ({reason}); expected a folder written by save_pretrained, or a repository"
        ) from error


def read(source: str | os.PathLike[str], download: Mapping[str, Any]) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Configuration and state dict of a saved network.

    Raises:
        ConfigError: a file is missing, damaged, or no valid configuration; the two are of different networks; a value
            is not finite; no such folder, or no such repository.
    """
    config_path, weights_path = (_locate(source, name, download) for name in (CONFIG_FILE, WEIGHTS_FILE))
    content = read_json(config_path)
    try:
        config = from_mapping(ModelConfig, content)
    except ConfigError as error:
        raise ConfigError(f"{config_path}: {error}") from None
    state, header = read_sealed(weights_path)
    check_finite(state, weights_path)
    _check_same(config_path, config, weights_path, header)
    return config, state


def _check_same(config_path: Path, config: ModelConfig, weights_path: Path, header: Mapping[str, str]) -> None:
    """Raise `ConfigError` if the weights were saved with another configuration; weights from elsewhere name none."""
    content = in_header(weights_path, header, "model")
    if content is None:
        return
    saved = to_mapping(from_mapping(ModelConfig, content, f"{weights_path}: model"))
    if changed := differences(saved, to_mapping(config)):
        raise ConfigError(
            f"{config_path}: differs from the configuration that {weights_path.name} was saved with: "
            f"{listed(changed)}; restore it"
        )


def write(folder: Path, config: ModelConfig, state: Mapping[str, Tensor]) -> None:
    """Write configuration and state dict into a folder that is there.

    Raises:
        ValueError: a tensor without values.
    """
    for name, tensor in state.items():
        if tensor.is_meta:
            raise ValueError(f"{name}: got a tensor on the meta device, expected one with values to save")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    header = {"format": "pt", "model": json.dumps(to_mapping(config))}
    write_sealed(folder / WEIGHTS_FILE, tensors, header)
    (folder / CONFIG_FILE).write_text(json.dumps(to_mapping(config), indent=2) + "\n", encoding="utf-8")


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A temporary folder to fill with files, for `folder`, which is made if it is missing.

    When the block ends well, configuration and weights take their places in `folder`, and other files where there are
    none of their names. When it does not, `folder` is as it was.

    Raises:
        ConfigError: the disk is full, or something cannot be written.
    """
    try:
        finish_folder(folder, WEIGHTS_FILE)
        if folder.is_dir() and others(folder):
            with _stage_inside(folder) as stage:
                yield stage
                _take_places(stage, folder)
        else:
            with atomic_folder(folder, replace=False, last=WEIGHTS_FILE) as stage:
                yield stage
    except OSError as error:
        state = "it is as it was before"
        if isinstance(error, UnfinishedError):
            state = "all was written; save it again, and what is not in its place is moved there"
        raise ConfigError(f"{folder}: cannot be written ({error.strerror or error}); {state}") from error


@contextmanager
def _stage_inside(folder: Path) -> Iterator[Path]:
    stage = temporary_name(folder / "network")
    try:
        stage.mkdir()
        yield stage
    finally:
        remove_tree(stage)


def _take_places(stage: Path, folder: Path) -> None:
    """Move the files of `stage` into `folder`, all of them or, where one cannot be, none."""
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if (folder / name).is_dir():
            raise ConfigError(f"{folder / name}: got a folder, expected a file to replace, or none")
    files = sorted(stage.iterdir())
    for file in files:
        sync(file)
    before = stage / "before"
    before.mkdir()
    moved: list[Path] = []
    try:
        for file in files:
            target = folder / file.name
            if target.exists() and file.name not in (CONFIG_FILE, WEIGHTS_FILE):
                continue
            if target.exists():
                link_or_copy(target, before / file.name)
            moved.append(target)
            os.replace(file, target)
    except BaseException:
        for target in reversed(moved):
            if (before / target.name).exists():
                os.replace(before / target.name, target)
            else:
                target.unlink(missing_ok=True)
        raise


def load_strict(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load a state dict that must fit to the last name and shape.

    Raises:
        ConfigError: names how many tensors are missing, unknown or of another shape, and the first of each.
    """
    own, state = model.state_dict(), dict(state)
    for name, module in model.named_modules():
        if isinstance(module, MemoryBank):
            module.reconcile(state, f"{name}." if name else "")
    problems = {
        "missing": sorted(own.keys() - state.keys()),
        "unknown": sorted(state.keys() - own.keys()),
        "of another shape": sorted(n for n in own.keys() & state.keys() if own[n].shape != state[n].shape),
    }
    found = [f"{len(names)} {what} (first: {names[0]})" for what, names in problems.items() if names]
    if found:
        raise ConfigError(f"{source}: got tensors that do not fit the network: {', '.join(found)}")
    model.load_state_dict(state)
