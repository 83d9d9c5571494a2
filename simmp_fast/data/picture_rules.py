"""What holds for pictures of every kind: their size, their transparent parts, and which way up they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from simmp_fast.data.errors import DataError
from simmp_fast.data.volume import Array, Volume, spread

# 65535 x 65535 is the largest JPEG; a damaged header can announce far more than any memory holds.
MAX_PIXELS = 10**9


def check_size(path: Path, width: int, height: int) -> None:
    """Refuse a picture of more than `MAX_PIXELS` before its pixels are read."""
    if width * height > MAX_PIXELS:
        raise DataError(f"{path}: got {width} x {height} = {width * height} pixels, expected at most {MAX_PIXELS}")


def one_picture(path: Path, count: int) -> None:
    """Refuse a file with `count` pictures, unless it is one."""
    if count != 1:
        raise DataError(f"{path}: got {count} frames, expected one picture in a file")


def as_volume(
    path: Path, values: Array, alpha: Array | None, opaque: float, orientation: int, bits: int, label: bool
) -> Volume:
    """A picture as images and as label maps are read.

    Args:
        path: the file, for messages.
        values: the colours, `[h, w]` or `[h, w, 3]`.
        alpha: `[h, w]`, or None.
        opaque: the alpha of a pixel that hides what lies behind it.
        orientation: the EXIF orientation, 1 to 8; any other number says nothing.
        bits: how many a value has; an image of fewer than 8 gets values from 0 to 255, a label map never.
        label: whether it is read as a label map.

    Raises:
        DataError: an image with transparent parts, or a label map in both the colours and alpha.
    """
    if alpha is not None and not (alpha == opaque).all():
        if label:
            values, bits = _alpha_labels(path, values, alpha), 8
        else:
            clear = int((alpha != opaque).sum())
            raise DataError(
                f"{path}: got {clear} of {alpha.size} pixels that are transparent, expected an opaque picture: "
                "what colour they have is not seen"
            )
    upright = _upright(values if label else spread(values, bits), orientation)
    return Volume(np.ascontiguousarray(upright), None, path, colour=upright.ndim == 3)


def _alpha_labels(path: Path, values: Array, alpha: Array) -> Array:
    """The labels of a mask that is not opaque: it is drawn in alpha, in one colour."""
    if (values == values[:1, :1]).all():
        return alpha
    raise DataError(
        f"{path}: got a mask whose colours vary and whose alpha channel is not opaque "
        f"(alpha from {alpha.min()} to {alpha.max()}), expected labels in one of the two"
    )


def _upright(array: Array, orientation: int) -> Array:
    """The picture as viewers show it. EXIF counts from 1: mirrored is 2, upside down 3, 5 to 8 lie on a side."""
    if orientation in (5, 6, 7, 8):
        array = array.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    return array
