"""Random turns, flips and small rotations of an image and its labels (model definition, section 8)."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from scipy import ndimage

from simmp_fast.data.formats import Array

DEGREES = range(-20, 20)


def augment(image: Array, label: Array, rng: np.random.Generator) -> tuple[Array, Array]:
    """With p 1/2 a quarter turn and a flip; else with p 1/2 a rotation by whole degrees in [-20, 20); else nothing.

    Args:
        image: `[C, S, S]`, any dtype.
        label: `[S, S]`, any dtype.
        rng: source of every draw.

    Returns:
        image and label, of the same shapes and dtypes; possibly views.
    """
    if rng.random() < 0.5:
        turns, axis = int(rng.integers(4)), int(rng.integers(2))
        return _turn_flip(image, turns, axis), _turn_flip(label, turns, axis)
    if rng.random() < 0.5:
        degrees = int(rng.integers(DEGREES.start, DEGREES.stop))
        return rotate(image, degrees), rotate(label, degrees)
    return image, label


def _turn_flip(array: Array, turns: int, axis: int) -> Array:
    return np.flip(np.rot90(array, turns, axes=(-2, -1)), axis - 2)


def rotate(array: Array, degrees: int) -> Array:
    """Rotate planes `[..., H, W]` about their centre, taking the nearest pixel; 0 where there is none.

    Equal, value by value, to ``scipy.ndimage.rotate(plane, degrees, reshape=False, order=0)``.
    """
    height, width = array.shape[-2:]
    source, outside = _rotation(height, width, degrees)
    planes = array.reshape(*array.shape[:-2], height * width).take(source, axis=-1)
    planes[..., outside] = 0
    return planes.reshape(array.shape)


@lru_cache(maxsize=len(DEGREES) * 2)
def _rotation(height: int, width: int, degrees: int) -> tuple[Array, Array]:
    """For each pixel of the rotated plane, in row-major order, the pixel it takes; and the pixels that take none.

    Rotating the pixel numbers themselves gives the map, since order 0 copies values. It is kept for each angle: scipy
    computes it anew for every plane.
    """
    numbers = np.arange(1, height * width + 1, dtype=np.float64).reshape(height, width)
    taken = ndimage.rotate(numbers, degrees, reshape=False, order=0).astype(np.intp).ravel() - 1
    outside = np.flatnonzero(taken < 0)
    return np.maximum(taken, 0), outside
