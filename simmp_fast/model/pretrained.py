"""Weights and configuration of a network in a folder: ``config.json`` beside ``model.safetensors``."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..config import ConfigError, ModelConfig, from_mapping, to_mapping

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


def _locate(source: str | os.PathLike[str], name: str, download: Mapping[str, Any]) -> Path:
    """The path of file `name` in a folder, or in the local copy of a repository on the Hub."""
    if os.path.isdir(source):
        path = Path(source) / name
        if not path.is_file():
            raise ConfigError(f"{path}: no such file; expected a folder written by save_pretrained")
        return path
    if os.path.sep in str(source)[:1] or str(source).startswith("."):
        raise ConfigError(f"{source}: no such folder")
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(str(source), name, **download))


def read(source: str | os.PathLike[str], download: Mapping[str, Any]) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Configuration and state dict of a saved network.

    Raises:
        ConfigError: a file is missing, truncated, or no valid configuration.
    """
    config_path, weights_path = (_locate(source, name, download) for name in (CONFIG_FILE, WEIGHTS_FILE))
    try:
        config = from_mapping(ModelConfig, json.loads(config_path.read_text(encoding="utf-8")))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{config_path}: cannot be read as JSON: {error}") from None
    try:
        return config, load_file(weights_path)
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{weights_path}: cannot be read as safetensors: {error}") from None


def write(folder: Path, config: ModelConfig, state: Mapping[str, Tensor]) -> None:
    """Write configuration and state dict, each to a temporary file that is then renamed."""
    folder.mkdir(parents=True, exist_ok=True)
    weights, text = folder / f".{WEIGHTS_FILE}.part", folder / f".{CONFIG_FILE}.part"
    try:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, weights)
        text.write_text(json.dumps(to_mapping(config), indent=2) + "\n", encoding="utf-8")
        weights.replace(folder / WEIGHTS_FILE)
        text.replace(folder / CONFIG_FILE)
    finally:
        weights.unlink(missing_ok=True)
        text.unlink(missing_ok=True)


def load_strict(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load a state dict that must fit to the last name and shape.

    Raises:
        ConfigError: names how many tensors are missing, unknown or of another shape, and the first of each.
    """
    own = model.state_dict()
    problems = {
        "missing": sorted(own.keys() - state.keys()),
        "unknown": sorted(state.keys() - own.keys()),
        "of another shape": sorted(n for n in own.keys() & state.keys() if own[n].shape != state[n].shape),
    }
    found = [f"{len(names)} {what} (first: {names[0]})" for what, names in problems.items() if names]
    if found:
        raise ConfigError(f"{source}: got tensors that do not fit the network: {', '.join(found)}")
    model.load_state_dict(dict(state))
