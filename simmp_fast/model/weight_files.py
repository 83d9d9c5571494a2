"""Named tensors in the files that circulate: safetensors, and checkpoints that hold them beside other things."""

from __future__ import annotations

import argparse
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import ConfigError
from ..messages import one_line, shown, why_no_file
from .sealing import read_sealed

_EXPECTED = "expected a file of the network's state_dict()"
_DEEPEST, _NAMED = 8, 8  # mappings in one another on the way to a network, and networks that a message names
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
    if why := why_no_file(path):
        raise ConfigError(f"{path}: {why}")
    if path.suffix == ".safetensors":
        return network_tensors(read_sealed(path)[0], str(path))
    try:
        _check_archive(path)
        with torch.serialization.safe_globals(_HARMLESS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch's advice on files of other kinds
            content = torch.load(path, map_location="cpu", weights_only=True)
    except ConfigError:
        raise
    except Exception as error:  # damaged pickles raise whatever their reader stumbles over
        raise ConfigError(f"{path}: cannot be read as a checkpoint of tensors alone: {_reason(error)}") from error
    tensors = network_tensors(content, str(path))
    size = path.stat().st_size
    for name, tensor in tensors.items():
        if tensor.untyped_storage().nbytes() > size:
            got = f"a tensor of {tensor.untyped_storage().nbytes()} bytes in a file of {size}"
            raise ConfigError(f"{path}: {name}: got {got}, expected one that lies in the file")
    return tensors


def _check_archive(path: Path) -> None:
    """Refuse an archive whose members unpack to more than the file has: PyTorch packs nothing."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            announced = sum(member.file_size for member in archive.infolist())
        if announced > (size := path.stat().st_size):
            raise ConfigError(f"{path}: got a file of {size} bytes that announces {announced}, expected no packed one")


def _reason(error: Exception) -> str:
    """What is wrong with a checkpoint. Never in PyTorch's words where it refuses code: these say how to run it."""
    text = str(error)
    code = re.search(r"GLOBAL ([\w.]+)", text)
    if code:
        return f"it needs {one_line(code[1], 100)}, which is code and is not loaded; {_EXPECTED}"
    if isinstance(error, pickle.UnpicklingError) or "weights_only" in text:
        return f"it holds something else than tensors and plain values, which is not loaded; {_EXPECTED}"
    return one_line(text.splitlines()[0] if text else type(error).__name__)


def network_tensors(content: object, where: str) -> dict[str, Tensor]:
    """The named tensors of the one network in what a checkpoint holds, without the prefixes of wrappers.

    Args:
        content: names and tensors, or a mapping that holds them under a usual key.
        where: what messages call it.

    Raises:
        ConfigError: no network's tensors, those of several, two tensors of one name, or one that is no array of real
            numbers: sparse, quantised, complex, without values.
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
            if odd := _odd(tensor):
                raise ConfigError(f"{where}: {plain}: got a tensor {odd}, expected one of plain numbers")
            tensors[plain] = tensor
    return tensors


def _odd(tensor: Tensor) -> str | None:
    """What makes a tensor another thing than an array of real numbers that is all there, or None."""
    if tensor.is_meta:
        return "without values (meta)"
    if tensor.layout is not torch.strided or tensor.is_nested:
        return "that is sparse or nested"
    if tensor.is_quantized or tensor.is_complex():
        return f"of {tensor.dtype}".replace("torch.", "")
    there = tensor.untyped_storage().nbytes()
    if tensor.numel() * tensor.element_size() > there:
        return f"of shape {list(tensor.shape)} that repeats {there} bytes"
    return None


def _networks(content: object, key: str = "", barren: set[int] | None = None) -> dict[str, Mapping[Any, Any]]:
    """Mappings that hold tensors, by the keys that lead there: a few if there are many.

    `barren` are the mappings that lead to none, or are being looked into: a file can make them hold one another.
    """
    barren = set() if barren is None else barren
    if not isinstance(content, Mapping) or id(content) in barren or key.count(".") > _DEEPEST:
        return {}
    barren.add(id(content))
    found: dict[str, Mapping[Any, Any]] = {}
    for holder in _HOLDERS:
        if len(found) < _NAMED:
            found |= _networks(content.get(holder), f"{key}.{holder}" if key else holder, barren)
    if not found and any(isinstance(value, Tensor) for value in content.values()):
        found[key] = content
    if found:
        barren.discard(id(content))
    return found


def _kind(content: object) -> str:
    if isinstance(content, Mapping):
        return f"a mapping of {', '.join(shown(key) for key in list(content)[:5]) or 'nothing'}"
    return f"a {type(content).__name__}"
