"""Checksums inside of safetensors files: a flipped bit anywhere is an error, and no file of its own is needed."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..documents import ConfigError, parse_json
from ..messages import Note, shown, why_no_file

# Both names are looked for, so that damage to one of them does not make a sealed file pass for one without a seal.
_MARK, _SUM = "sealed", "sha256"


def write_sealed(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write contiguous tensors (on the CPU) and metadata as a sealed safetensors file.

    In one piece: safetensors' own writer of files leaves a temporary file of its own where it is killed.
    """
    path.write_bytes(save(dict(tensors), seal(tensors, metadata)))


def seal(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """`metadata` with a checksum of itself and of the names, dtypes, shapes and bytes of `tensors` (on the CPU)."""
    marked = {**metadata, _MARK: _SUM}
    return {**marked, _SUM: _checksum(tensors, marked)}


def read_sealed(path: Path, error: type[ValueError] = ConfigError) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors (on the CPU) and the metadata of a safetensors file, checked against its seal.

    A file without one, from elsewhere, is read with a `Note`.

    Args:
        path: the file.
        error: what to raise.

    Raises:
        error: the file is missing, cannot be read, or differs from its seal; names it and says what to do.
    """
    if why := why_no_file(path):
        raise error(f"{path}: {why}")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError) as problem:
        raise error(f"{path}: cannot be read as safetensors: truncated or damaged checkpoint ({problem})") from None
    if _MARK not in metadata and _SUM not in metadata:
        warnings.warn(Note(f"{path}: holds no checksum, so damage to its values cannot be noticed"), stacklevel=2)
    elif _checksum(tensors, {key: value for key, value in metadata.items() if key != _SUM}) != metadata.get(_SUM):
        raise error(
            f"{path}: damaged: its contents differ from the checksum in it; copy it again from where it came, or use "
            "another checkpoint"
        )
    return tensors, metadata


def in_header(path: Path, header: Mapping[str, str], key: str, error: type[ValueError] = ConfigError) -> Any:
    """What the metadata of a safetensors file hold as JSON under `key`; None if they do not.

    Raises:
        error: no JSON; names file and key.
    """
    try:
        return parse_json(header[key]) if key in header else None
    except ConfigError as problem:
        raise error(f"{path}: {key}: got {shown(header[key])} in the header, expected JSON ({problem})") from None


def check_finite(tensors: Mapping[str, Tensor], source: str | Path) -> None:
    """Raise `ConfigError`, which names `source` and the tensor, if a value is NaN or infinite."""
    for name, tensor in tensors.items():
        if tensor.is_complex():
            raise ConfigError(f"{source}: {name}: got complex numbers, expected real ones")
        one_byte = tensor.is_floating_point() and tensor.itemsize == 1  # PyTorch cannot ask float8
        values = tensor.float() if one_byte else tensor
        if values.is_floating_point() and not bool(values.isfinite().all()):
            count = int((~values.isfinite()).sum())
            raise ConfigError(
                f"{source}: {name}: got {count} of {tensor.numel()} values that are not finite, expected numbers; use "
                "an earlier checkpoint"
            )


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    total = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        total.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()
