"""Arrays in npz and HDF5 files: an image, and perhaps its label."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from simmp_fast.data.errors import DataError
from simmp_fast.data.volume import Array, Volume, library

# What files in circulation call an image and a label.
_NAMES = {"image": ("image", "img"), "label": ("label",)}
# What netCDF writes beside an array whose values are not what they seem.
_MISSING, _PACKED = ("_FillValue", "missing_value"), {"scale_factor": 1, "add_offset": 0}


def read_arrays(path: Path, key: str) -> Volume:
    """The array `key` ("image" or "label") of a file: `[h, w]` or `[d, h, w]`, an image perhaps with a last axis of 3.

    Axes of 1 that are neither slices, rows nor columns are left out: all at the end, and those in front and between
    that are more than three.

    Raises:
        DataError: no such array, another number of axes, or values that are masked, packed or Python objects.
    """
    if path.name.lower().endswith(".npz"):
        loaded = np.load(path, allow_pickle=False)
        if not isinstance(loaded, np.lib.npyio.NpzFile):
            raise DataError(f"{path}: got one array without a name (npy), expected an npz file")
        with loaded as content:
            array = _npz_array(content, _name(content, key, path), path)
    else:
        with library("h5py", path).File(path, "r") as content:
            array = _hdf5_array(content, _name(content, key, path), path)
    colour, shape = _data_axes(array.shape, key == "image")
    if len(shape) - colour not in (2, 3):
        raise DataError(f"{path}: got {key} of shape {list(array.shape)}, expected [h, w] or [d, h, w]")
    return Volume(array.reshape(shape), None, path, colour)


def _name(content: Any, key: str, path: Path) -> str:
    names = _NAMES[key]
    name = next((n for n in names if n in content), None)
    if name is None:
        need = " or ".join(map(repr, names))
        raise DataError(f"{path}: no array {need} in the file, got {', '.join(content) or 'none'}")
    return name


def _npz_array(content: Any, name: str, path: Path) -> Array:
    try:
        return np.asarray(content[name])
    except ValueError as error:
        if "allow_pickle" not in str(error):
            raise
        raise DataError(f"{path}: got Python objects as {name!r}, expected numbers ({error})") from None


def _hdf5_array(content: Any, name: str, path: Path) -> Array:
    dataset = content[name]
    if not hasattr(dataset, "dtype"):
        raise DataError(f"{path}: got a group {name!r}, expected an array")
    _check_stored(dataset, name, path)
    array = np.asarray(dataset[()])
    packed = [key for key, plain in _PACKED.items() if (np.asarray(dataset.attrs.get(key, plain)) != plain).any()]
    if array.dtype.kind == "i" and str(dataset.attrs.get("_Unsigned", "false")).lower() == "true":
        packed.append("_Unsigned")
    if packed:
        raise DataError(f"{path}: got a packed array {name!r} ({', '.join(packed)}), expected its true values")
    for key in _MISSING:
        if key in dataset.attrs and (missing := int(np.isin(array, dataset.attrs[key]).sum())):
            value = np.ravel(dataset.attrs[key])[0]
            raise DataError(f"{path}: {missing} values of {name!r} are missing ({key} = {value}), expected all")
    return array


def _check_stored(dataset: Any, name: str, path: Path) -> None:
    """Refuse an array of which HDF5 would make up values: those of other files that are gone, or never written."""
    if dataset.is_virtual:
        raise DataError(f"{path}: got a virtual array {name!r}, made of others, expected one that has its own values")
    if dataset.chunks:
        need = math.prod(-(-side // chunk) for side, chunk in zip(dataset.shape, dataset.chunks, strict=True))
        there = dataset.id.get_num_chunks()
    else:
        need, there = 1, int(dataset.id.get_storage_size() > 0)
    if dataset.size and there < need:
        raise DataError(f"{path}: got an array {name!r} of which {need - there} of {need} parts were never written")


def _data_axes(shape: tuple[int, ...], image: bool) -> tuple[bool, list[int]]:
    """Whether the last axis is colour, and the shape without axes of 1 that stand for nothing."""
    axes = _without_last_ones(list(shape))
    colour = image and len(axes) > 2 and axes[-1] == 3
    if colour:
        axes = _without_last_ones(axes[:-1])
    while len(axes) > 3 and 1 in axes:
        axes.remove(1)
    return colour, axes + [3] * colour


def _without_last_ones(axes: list[int]) -> list[int]:
    while len(axes) > 2 and axes[-1] == 1:
        axes = axes[:-1]
    return axes
