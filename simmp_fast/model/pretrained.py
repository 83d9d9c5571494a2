"""Weights and configuration of a network in a folder: ``config.json`` beside ``model.safetensors``."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from ..config import ConfigError, ModelConfig, from_mapping, read_json, to_mapping
from .memory import MemoryBank
from .weight_files import read_safetensors

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
        ConfigError: a file is missing, truncated, or no valid configuration; no such folder, or no such repository.
    """
    config_path, weights_path = (_locate(source, name, download) for name in (CONFIG_FILE, WEIGHTS_FILE))
    content = read_json(config_path)
    try:
        config = from_mapping(ModelConfig, content)
    except ConfigError as error:
        raise ConfigError(f"{config_path}: {error}") from None
    return config, read_safetensors(weights_path)


def write(folder: Path, config: ModelConfig, state: Mapping[str, Tensor]) -> None:
    """Write configuration and state dict into a folder that is there.

    Raises:
        ValueError: a tensor without values.
    """
    for name, tensor in state.items():
        if tensor.is_meta:
            raise ValueError(f"{name}: got a tensor on the meta device, expected one with values to save")
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / WEIGHTS_FILE)
    (folder / CONFIG_FILE).write_text(json.dumps(to_mapping(config), indent=2) + "\n", encoding="utf-8")


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A temporary folder to fill, inside `folder`, which is made if it is missing.

    When the block ends well, configuration and weights take their places in `folder`, and other files where there are
    none of their names. When it does not, `folder` is as it was.

    Raises:
        ConfigError: the disk is full, or something cannot be written.
    """
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", dir=folder) as name:
            yield Path(name)
            _take_places(Path(name), folder)
    except BaseException as error:
        for place in made:
            with suppress(OSError):
                place.rmdir()
        if isinstance(error, (OSError, SafetensorError)):
            reason = getattr(error, "strerror", None) or str(error)
            raise ConfigError(f"{folder}: cannot be written ({reason}); it is as it was before") from error
        raise


def _take_places(stage: Path, folder: Path) -> None:
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if (folder / name).is_dir():
            raise ConfigError(f"{folder / name}: got a folder, expected a file to replace, or none")
    for file in sorted(stage.iterdir()):
        with open(file, "rb") as written:
            os.fsync(written.fileno())
        if file.name in (CONFIG_FILE, WEIGHTS_FILE) or not (folder / file.name).exists():
            file.replace(folder / file.name)


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
