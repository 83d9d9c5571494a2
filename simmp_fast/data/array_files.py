"""Arrays in npz and HDF5 files: an image, and perhaps its label."""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np

from simmp_fast.data.errors import DataError
from simmp_fast.data.hdf5_files import hdf5_array
from simmp_fast.data.names import listed
from simmp_fast.data.volume import DEFLATE, Array, Volume, check_announced, check_type, library

# What files in circulation call an image and a label.
_NAMES = {"image": ("image", "img"), "label": ("label",)}
_LONGEST_HEADER = 1000  # bytes, of an npy file: that of plain numbers has 118


def read_arrays(path: Path, key: str) -> Volume:
    """The array `key` ("image" or "label") of a file: `[h, w]` or `[d, h, w]`, an image perhaps with a last axis of 3.

    Axes of 1 that are neither slices, rows nor columns are left out: all at the end, and those in front and between
    that are more than three.

    Raises:
        DataError: no such array, another number of axes, values that are masked, packed or no numbers, or a size that
            the file cannot hold.
    """
    if path.name.lower().endswith(".npz"):
        array = _npz_array(path, key)
    else:
        with library("h5py", path).File(path, "r") as content:
            array = hdf5_array(content, _name(list(content), key, path), path)
    colour, shape = _data_axes(array.shape, key == "image")
    if len(shape) - colour not in (2, 3):
        raise DataError(f"{path}: got {key} of shape {list(array.shape)}, expected [h, w] or [d, h, w]")
    return Volume(array.reshape(shape), None, path, colour)


def _name(there: Sequence[str], key: str, path: Path) -> str:
    name = next((n for n in _NAMES[key] if n in there), None)
    if name is None:
        need = " or ".join(map(repr, _NAMES[key]))
        raise DataError(f"{path}: no array {need} in the file, got {listed(there) or 'none'}")
    return name


def _npz_array(path: Path, key: str) -> Array:
    """The array of a zip file of npy files, whose sizes are checked one against the other before any is believed."""
    with open(path, "rb") as file:
        start = file.read(6)
    if start == b"\x93NUMPY":
        raise DataError(f"{path}: got one array without a name (npy), expected an npz file")
    if not start.startswith(b"PK"):
        raise DataError(f"{path}: corrupt or truncated file (no zip file, which npz files are)")
    with zipfile.ZipFile(path) as archive:
        members = [member for member in archive.infolist() if member.filename.endswith(".npy")]
        name = _name([member.filename.removesuffix(".npy") for member in members], key, path)
        found = [member for member in members if member.filename == f"{name}.npy"]
        if len(found) > 1:
            raise DataError(f"{path}: got {len(found)} arrays {name!r}, expected one")
        _check_member(found[0], name, path)
        with archive.open(found[0]) as stored:
            _check_header(stored, found[0].file_size, name, path)
        with archive.open(found[0]) as stored:
            array: Array = np.lib.format.read_array(stored, allow_pickle=False)
        return array


def _check_member(member: zipfile.ZipInfo, name: str, path: Path) -> None:
    if member.flag_bits & 1:
        raise DataError(f"{path}: got {name!r} encrypted, expected an array that can be read without a password")
    folds = {zipfile.ZIP_STORED: 1, zipfile.ZIP_DEFLATED: DEFLATE}
    if member.compress_type not in folds:
        raise DataError(
            f"{path}: got {name!r} compressed by method {member.compress_type} of zip files, expected none (0) or "
            "deflate (8), which NumPy writes"
        )
    stored = min(member.compress_size, path.stat().st_size)
    check_announced(path, repr(name), member.file_size, stored, folds[member.compress_type])


def _check_header(stored: IO[bytes], size: int, name: str, path: Path) -> None:
    """Refuse an array whose header announces other bytes than there are, or what is no number."""
    start = stored.read(10)
    length = int.from_bytes(start[8:10], "little")
    # The versions 2 and 3 are for headers that arrays of plain numbers do not have.
    if not start.startswith(b"\x93NUMPY\x01\x00") or length > _LONGEST_HEADER:
        raise DataError(
            f"{path}: corrupt or truncated file ({name!r} starts with {start!r}, expected npy version 1.0 and a header "
            f"of at most {_LONGEST_HEADER} bytes)"
        )
    header = io.BytesIO(start[8:] + stored.read(length))
    shape, _, dtype = np.lib.format.read_array_header_1_0(header)
    check_type(dtype, name, path)
    if any(side < 0 for side in shape):
        raise DataError(f"{path}: got {name!r} of shape {list(shape)}, expected sides of at least 0")
    expected = 10 + length + math.prod(shape) * dtype.itemsize
    if size != expected:
        raise DataError(f"{path}: corrupt or truncated file ({name!r} has {size} bytes, expected {expected})")


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
