"""Overlap and surface metrics of one class: Dice, Jaccard, HD95 and ASD, exact and on cropped masks.

The surface of a mask is what erosion with the cross-shaped neighbourhood (connectivity 1) takes away, voxels beyond the
image counting as outside the mask. Both distance metrics are statistics of one pooled sample: the distance of every
surface voxel of either mask to the nearest surface voxel of the other. HD95 is its 95th percentile, ASD its mean.

Two identities make this cheap. Only the masks' common box matters: a voxel beyond it belongs to neither mask, exactly
as a voxel beyond the image does. And surfaces are thin: a k-d tree over their voxels gives the same distances as a
distance transform of the box; 0.3 s in place of 8 s (one core) where specks stretch the box over most of 148x512x512.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import cKDTree

METRICS = ("dice", "hd95", "jaccard", "asd")

Mask = NDArray[np.bool_]
Labels = NDArray[np.integer]


@dataclass(frozen=True)
class Measurement:
    """The metrics of one class in one case; None where a metric is undefined.

    Attributes:
        dice: `2 |P and T| / (|P| + |T|)`; undefined where both masks are empty.
        hd95: 95th percentile of the pooled surface distances; undefined where either mask is empty.
        jaccard: `|P and T| / |P or T|`; undefined where both masks are empty.
        asd: mean of the pooled surface distances; undefined where either mask is empty.
        predicted: voxels of the prediction.
        true: voxels of the truth.
    """

    dice: float | None
    hd95: float | None
    jaccard: float | None
    asd: float | None
    predicted: int
    true: int


def surface(mask: Mask) -> Mask:
    """The surface voxels of a mask of any number of dimensions, bool, same shape."""
    cross = ndimage.generate_binary_structure(mask.ndim, 1)
    return mask & ~ndimage.binary_erosion(mask, cross)


def _nearest(points: NDArray[np.int64], others: NDArray[np.int64], spacing: NDArray[np.float64]) -> NDArray[np.float64]:
    """Distance of each of `points` [n, d] to the nearest of `others` [m, d], voxel indices scaled by `spacing`."""
    if not len(points):
        return np.zeros(0)
    # The two options halve the time to build a tree over grid points and leave the distances as they are.
    tree = cKDTree(others * spacing, balanced_tree=False, compact_nodes=False)
    return np.asarray(tree.query(points * spacing)[0])


def surface_distances(prediction: Mask, truth: Mask, spacing: Sequence[float] | None = None) -> NDArray[np.float64]:
    """The pooled two-way surface distances, in no particular order.

    Args:
        prediction: bool, any number of dimensions, at least one voxel set.
        truth: bool, same shape, at least one voxel set.
        spacing: voxel size along each axis; None measures in voxels.

    Returns:
        float64 [surface voxels of the prediction + those of the truth], in the unit of `spacing`.

    Raises:
        ValueError: shapes differ, an empty mask, or a spacing that does not fit.
    """
    _check_pair(prediction, truth)
    scale = _check_spacing(spacing, prediction.ndim)
    for name, mask in (("prediction", prediction), ("truth", truth)):
        if not mask.any():
            raise ValueError(f"{name}: got an empty mask, expected at least one voxel (no distance is defined)")
    first, second = surface(prediction), surface(truth)
    # Voxels on both surfaces are at distance 0 from each other: most of them in a good prediction.
    shared = int(np.count_nonzero(first & second))
    there = _nearest(np.argwhere(first & ~second), np.argwhere(second), scale)
    back = _nearest(np.argwhere(second & ~first), np.argwhere(first), scale)
    return np.concatenate([np.zeros(2 * shared), there, back])


def measure(prediction: Mask, truth: Mask, spacing: Sequence[float] | None = None) -> Measurement:
    """Every metric of one pair of masks.

    Args:
        prediction: bool, any number of dimensions.
        truth: bool, same shape.
        spacing: voxel size along each axis; None measures distances in voxels.

    Raises:
        ValueError: shapes differ, or a spacing that does not fit.
    """
    _check_pair(prediction, truth)
    _check_spacing(spacing, prediction.ndim)
    predicted, true = int(np.count_nonzero(prediction)), int(np.count_nonzero(truth))
    common = int(np.count_nonzero(prediction & truth))
    if predicted + true == 0:
        return Measurement(None, None, None, None, 0, 0)
    dice = 2 * common / (predicted + true)
    jaccard = common / (predicted + true - common)
    if predicted == 0 or true == 0:
        return Measurement(dice, None, jaccard, None, predicted, true)
    distances = surface_distances(prediction, truth, spacing)
    hd95, asd = float(np.percentile(distances, 95)), float(distances.mean())
    return Measurement(dice, hd95, jaccard, asd, predicted, true)


def measure_classes(
    prediction: Labels, truth: Labels, classes: int, spacing: Sequence[float] | None = None
) -> list[Measurement]:
    """Every metric of every foreground class of a pair of label maps, each class on its own common box.

    Args:
        prediction: labels 0 to `classes` - 1, integer, any number of dimensions.
        truth: the same, same shape.
        classes: number of classes, background included.
        spacing: voxel size along each axis; None measures distances in voxels.

    Returns:
        `classes` - 1 measurements, of labels 1, 2, ...

    Raises:
        ValueError: shapes differ, a label out of range, or a spacing that does not fit.
    """
    _check_pair(prediction, truth)
    _check_spacing(spacing, prediction.ndim)
    for name, labels in (("prediction", prediction), ("truth", truth)):
        if labels.size and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
            raise ValueError(f"{name}: got labels {labels.min()} to {labels.max()}, expected 0 to {classes - 1}")
    boxes = zip(
        ndimage.find_objects(prediction, max_label=classes - 1),
        ndimage.find_objects(truth, max_label=classes - 1),
        strict=True,
    )
    results = []
    for label, (first, second) in enumerate(boxes, start=1):
        box = _common_box(first, second, prediction.ndim)
        results.append(measure(prediction[box] == label, truth[box] == label, spacing))
    return results


def _common_box(
    first: tuple[slice, ...] | None, second: tuple[slice, ...] | None, dimensions: int
) -> tuple[slice, ...]:
    """The smallest box that holds both; None stands for an empty mask."""
    if first is None or second is None:
        return first or second or (slice(0, 0),) * dimensions
    return tuple(slice(min(a.start, b.start), max(a.stop, b.stop)) for a, b in zip(first, second, strict=True))


def _check_pair(prediction: NDArray[np.generic], truth: NDArray[np.generic]) -> None:
    if prediction.shape != truth.shape:
        raise ValueError(f"prediction: got shape {prediction.shape}, expected {truth.shape} as truth has")


def _check_spacing(spacing: Sequence[float] | None, dimensions: int) -> NDArray[np.float64]:
    """`spacing` as an array of `dimensions` values; ones where there is none."""
    if spacing is None:
        return np.ones(dimensions)
    scale = np.asarray(spacing, dtype=np.float64)
    if scale.shape != (dimensions,) or not (np.isfinite(scale).all() and (scale > 0).all()):
        raise ValueError(f"spacing: got {tuple(spacing)}, expected {dimensions} numbers above 0")
    return scale
