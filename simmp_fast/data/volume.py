"""What every reader of image files gives, and what they share."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from simmp_fast.data.errors import DataError

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Volume:
    """An image, a volume or a label map as its file holds it.

    Attributes:
        array: NIfTI `[x, y, z]`, picture `[h, w]`, stack `[d, h, w]`; a colour image has a last axis of 3.
        affine: float64 `[4, 4]`, voxel indices to millimetres (NIfTI), or None.
        path: the file.
        colour: whether the last axis of `array` is colour.
    """

    array: Array
    affine: Array | None
    path: Path
    colour: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The size of `array` without colour."""
        return self.array.shape[:-1] if self.colour else self.array.shape


def library(name: str, path: str | Path) -> Any:
    """Import an optional module that the file `path` needs; a `DataError` says what to install if it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.partition(".")[0]
        raise DataError(f"{path}: this kind of file needs {package}: pip install {package}") from None


def spread(array: Array, bits: int) -> Array:
    """Values of fewer than 8 bits as grey values 0..255, as they are shown: uint8; other arrays as they are."""
    if bits >= 8:
        return array
    table = np.rint(np.arange(2**bits) * (255 / (2**bits - 1))).astype(np.uint8)
    return table[array.astype(np.uint8)]
