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
        DataError: shapes, orientations or spacings differ, or values that stand for no class.
    """
    where = f"{label.path}" if label.path != image.path else f"{label.path} (label)"
    if label.shape != image.shape:
        raise DataError(f"{where}: got shape {list(label.shape)}, expected {list(image.shape)} as {image.path} has")
    if label.affine is not None and image.affine is not None:
        got, need = geometry(label, slice_axis), geometry(image, slice_axis)
        if (got.order, got.flipped) != (need.order, need.flipped):
            raise DataError(f"{where}: its axes run in other directions than those of {image.path}")
        if not np.allclose(got.spacing, need.spacing, rtol=0.01):
            got_mm, need_mm = ([round(s, 4) for s in spacing] for spacing in (got.spacing, need.spacing))
            raise DataError(f"{where}: got spacing {got_mm} mm, expected {need_mm} as {image.path} has")
    known = dict(values) if values is not None else {i: i for i in range(len(classes))}
    found, inverse = np.unique(label.array, return_inverse=True)
    strange = [int(v) for v in found if int(v) not in known]
    if strange:
        listed = ", ".join(map(str, strange[:8])) + (", ..." if len(strange) > 8 else "")
        need_text = ", ".join(map(str, sorted(known)))
        hint = "" if values is not None else "; mask_values can map the file's values to classes"
        raise DataError(f"{where}: got labels {listed}, expected only {need_text} ({len(classes)} classes){hint}")
    table = np.array([known[int(v)] for v in found], np.uint8)
    return table[inverse].reshape(label.shape)
