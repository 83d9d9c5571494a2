"""What a data set offers to `prepare`: its cases, each read on demand, and how they are split."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from simmp_fast.data.errors import DataError
from simmp_fast.data.formats import Array, Volume
from simmp_fast.data.preprocess import Recipe, geometry

_AWAY = 0.1  # of the smallest voxel side: what rounding in a header may move a corner


@dataclass(frozen=True)
class SourceCase:
    """One case of a data set.

    Attributes:
        id: its name, unique in the data set.
        source: the file it comes from, in words fit for a message and for the cache.
        load: reads it: the image, and labels uint8 of the image's shape; raises `DataError`.
    """

    id: str
    source: str
    load: Callable[[], tuple[Volume, Array]]


class Source(Protocol):
    """A data set as `prepare` sees it."""

    @property
    def name(self) -> str:
        """The data set's name."""
        ...

    @property
    def cases(self) -> Sequence[SourceCase]:
        """All its cases."""
        ...

    @property
    def problems(self) -> Sequence[str]:
        """What is wrong with its files, seen without reading them: one line each."""
        ...

    def recipe(self, image_size: int) -> Recipe:
        """How its files become the network's input."""
        ...

    def splits(self) -> dict[str, list[str]]:
        """ "train", "validation" and "test" to case ids."""
        ...


def drawn(ids: Iterable[str], seed: int) -> list[str]:
    """Case ids in a random order that depends on nothing but the ids and the seed.

    By checksum and not by a random generator: the same with every version of every library.
    """
    return sorted(ids, key=lambda case_id: hashlib.sha256(f"{seed}:{case_id}".encode()).hexdigest())


def checked_label(
    image: Volume, label: Volume, classes: Sequence[str], values: Mapping[int, int] | None, slice_axis: str
) -> Array:
    """The label map that belongs to an image, as classes.

    Args:
        image: the image.
        label: its label map as read.
        classes: names; a label is an index into them.
        values: value in the file to class; None takes the values as classes.
        slice_axis: for volumes with an orientation.

    Returns:
        uint8, in the shape of the image without colour.

    Raises:
        DataError: shapes differ, image and label lie in different places, or values that stand for no class.
    """
    where = f"{label.path}" if label.path != image.path else f"{label.path} (label)"
    if _shape(label) != _shape(image):
        raise DataError(f"{where}: got shape {list(label.shape)}, expected {list(image.shape)} as {image.path} has")
    if label.affine is not None and image.affine is not None:
        _check_place(where, label, image, slice_axis)
    known = dict(values) if values is not None else {i: i for i in range(len(classes))}
    found, inverse = _distinct(label.array)
    strange = [int(v) for v in found if int(v) not in known]
    if strange:
        listed = ", ".join(map(str, strange[:8])) + (", ..." if len(strange) > 8 else "")
        need_text = ", ".join(map(str, sorted(known)))
        hint = "" if values is not None else "; mask_values can map the file's values to classes"
        raise DataError(f"{where}: got labels {listed}, expected only {need_text} ({len(classes)} classes){hint}")
    table = np.array([known[int(v)] for v in found], np.uint8)
    return table[inverse].reshape(image.shape)


def _distinct(array: Array) -> tuple[Array, Array]:
    """As `np.unique` with the inverse; without its sorting, which takes half a minute, where the range is small."""
    low, high = int(array.min()), int(array.max())
    if high - low >= 2**16:
        found, inverse = np.unique(array, return_inverse=True)
        return found, inverse.reshape(array.shape)
    shifted = array - low
    offsets = np.flatnonzero(np.bincount(shifted.ravel(order="K")))
    places = np.zeros(high - low + 1, np.uint16)
    places[offsets] = np.arange(len(offsets))
    return offsets + low, places[shifted]


def _shape(volume: Volume) -> tuple[int, ...]:
    """The shape to compare: a stack of one slice is a slice, where no orientation says which axis counts slices."""
    shape = volume.shape
    return shape[1:] if volume.affine is None and len(shape) == 3 and shape[0] == 1 else shape


def _check_place(where: str, label: Volume, image: Volume, slice_axis: str) -> None:
    """Refuse a label map whose voxels do not lie on those of its image, of the same shape."""
    assert label.affine is not None
    assert image.affine is not None
    got, need = geometry(label, slice_axis), geometry(image, slice_axis)
    if (got.order, got.flipped) != (need.order, need.flipped):
        raise DataError(f"{where}: its axes run in other directions than those of {image.path}")
    if not np.allclose(got.spacing, need.spacing, rtol=0.01, atol=0):
        raise DataError(
            f"{where}: got spacing {_listed(got.spacing)} mm, expected {_listed(need.spacing)} as {image.path} has"
        )
    corners = np.array([[*corner, 1] for corner in np.ndindex(2, 2, 2)]) * [*(s - 1 for s in image.shape), 1]
    moved = ((label.affine - image.affine) @ corners.T)[:3].T
    furthest = moved[np.linalg.norm(moved, axis=1).argmax()]
    distance, side = float(np.linalg.norm(furthest)), min(need.spacing)
    if distance > _AWAY * side:
        raise DataError(
            f"{where}: lies up to {distance:.4g} mm away from {image.path} (by {_listed(furthest)} mm to the right, "
            f"front and head), expected at most {_AWAY} of a voxel side of {side:.4g} mm; the origins are "
            f"{_listed(label.affine[:3, 3])} and {_listed(image.affine[:3, 3])}"
        )


def _listed(values: Iterable[float]) -> list[float]:
    return [float(f"{value:.5g}") for value in values]
