"""Named tensors in the files that circulate: safetensors, and checkpoints that hold them beside other things."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..config import ConfigError

# Under which key a checkpoint holds its network, beside an optimiser, epochs and whatever else.
_HOLDERS = (
    "state_dict", "model_state_dict", "model_state", "model", "net_state_dict", "net", "network", "weights",
    "state_dict_ema", "model_ema", "ema",
)  # fmt: skip
# What data parallel training, compilation, averaging and enclosing modules put before every name.
_WRAPPERS = re.compile(r"^(?:(?:module|_orig_mod|model|net|network|backbone)\.)+")
# What training scripts like to save beside tensors: parsed arguments, and numbers of NumPy by their old and new names.
_HARMLESS: list[Any] = [
    argparse.Namespace,
    np.dtype,
    *{type(np.dtype(code)) for code in "?bBhHiIlLqQefd"},
    (np.float64(0).__reduce__()[0], "numpy.core.multiarray.scalar"),
    (np.float64(0).__reduce__()[0], "numpy._core.multiarray.scalar"),
]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The named tensors of a network in a file, on the CPU. No code is ever unpickled.

    Args:
        path: a safetensors file, or what ``torch.save`` wrote: names and tensors, alone or under a usual key such as
            ``state_dict``. Prefixes of wrappers such as ``module.`` are taken off; what is no tensor is left out.

    Raises:
        ConfigError: no such file, one that cannot be read, or one without one network's tensors.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such file" if not path.exists() else f"{path}: got a folder, expected a file")
    if path.suffix == ".safetensors":
        return network_tensors(read_safetensors(path), str(path))
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged pickles raise whatever their reader stumbles over
        raise ConfigError(f"{path}: cannot be read as a checkpoint of tensors alone: {_reason(error)}") from error
    return network_tensors(content, str(path))


def _reason(error: Exception) -> str:
    code = re.search(r"GLOBAL ([\w.]+)", str(error))
    if code:
        return f"it needs {code[1]}, which is code; expected a file of the network's state_dict()"
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Raises:
        ConfigError: the file is missing, truncated or damaged.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path}: cannot be read as safetensors: {error}") from None


def network_tensors(content: object, where: str) -> dict[str, Tensor]:
    """The named tensors of the one network in what a checkpoint holds, without the prefixes of wrappers.

    Args:
        content: names and tensors, or a mapping that holds them under a usual key.
        where: what messages call it.

    Raises:
        ConfigError: no network's tensors, those of several, or two tensors of one name.
    """
    found = _networks(content)
    if not found:
        raise ConfigError(f"{where}: got {_kind(content)}, without a state dict, expected names and tensors")
    if len(found) > 1:
        raise ConfigError(f"{where}: got several networks, under {', '.join(found)}, expected a file of one of them")
    ((_, named),) = found.items()
    tensors: dict[str, Tensor] = {}
    for name, tensor in named.items():
        if isinstance(name, str) and isinstance(tensor, Tensor):
            plain = _WRAPPERS.sub("", name)
            if plain in tensors:
                raise ConfigError(f"{where}: got {plain!r} twice, under several prefixes, expected one network")
            tensors[plain] = tensor
    return tensors


def _networks(content: object, key: str = "") -> dict[str, Mapping[Any, Any]]:
    """All mappings that hold tensors, by the keys that lead there."""
    if not isinstance(content, Mapping):
        return {}
    found: dict[str, Mapping[Any, Any]] = {}
    for holder in _HOLDERS:
        found |= _networks(content.get(holder), f"{key}.{holder}" if key else holder)
    if not found and any(isinstance(value, Tensor) for value in content.values()):
        found[key] = content
    return found


def _kind(content: object) -> str:
    if isinstance(content, Mapping):
        return f"a mapping of {', '.join(repr(key) for key in list(content)[:5]) or 'nothing'}"
    return f"a {type(content).__name__}"
