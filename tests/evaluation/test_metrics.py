"""Metrics against the golden values, against their definition, and unchanged by cropping."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import ndimage

from simmp_fast.evaluation.metrics import measure, measure_classes, surface, surface_distances
from simmp_fast.evaluation.protocols import get_protocol

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "metrics.npz")
CASES = sorted(name.removesuffix("_metrics") for name in GOLDEN.files if name.endswith("_metrics"))
ORDER = ("dice", "hd95", "jaccard", "asd")


def surface_by_definition(mask: np.ndarray) -> list[tuple[int, ...]]:
    """Voxels of the mask with a neighbour, along some axis, that is outside the mask or the image."""
    found = []
    for voxel in zip(*np.nonzero(mask), strict=True):
        for axis in range(mask.ndim):
            for step in (-1, 1):
                other = list(voxel)
                other[axis] += step
                outside = not 0 <= other[axis] < mask.shape[axis]
                if outside or not mask[tuple(other)]:
                    found.append(tuple(int(v) for v in voxel))
                    break
            else:
                continue
            break
    return found


def distances_by_definition(first: np.ndarray, second: np.ndarray, spacing: tuple[float, ...]) -> np.ndarray:
    """Every pair of surface voxels: the nearest of the other surface, both ways, sorted."""
    a = np.array(surface_by_definition(first)) * np.array(spacing)
    b = np.array(surface_by_definition(second)) * np.array(spacing)
    pairs = np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))
    return np.sort(np.concatenate([pairs.min(1), pairs.min(0)]))


def full_volume(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """HD95 and ASD from distance transforms of the whole volume."""
    cross = ndimage.generate_binary_structure(first.ndim, 1)
    a = first & ~ndimage.binary_erosion(first, cross)
    b = second & ~ndimage.binary_erosion(second, cross)
    pooled = np.concatenate([ndimage.distance_transform_edt(~b)[a], ndimage.distance_transform_edt(~a)[b]])
    return float(np.percentile(pooled, 95)), float(pooled.mean())


@pytest.mark.parametrize("case", CASES)
def test_golden(case: str) -> None:
    score = get_protocol("published").score(
        GOLDEN[f"{case}_pred"].astype(np.uint8), GOLDEN[f"{case}_gt"].astype(np.uint8), 2, None
    )[0]
    np.testing.assert_allclose([getattr(score, m) for m in ORDER], GOLDEN[f"{case}_metrics"], rtol=1e-12, atol=1e-12)


def test_golden_tells_pooling_apart() -> None:
    """The golden data would catch an ASD that averages the two directions' means."""
    prediction, truth = GOLDEN["far_pred"], GOLDEN["far_gt"]
    there = ndimage.distance_transform_edt(~surface(truth))[surface(prediction)].mean()
    back = ndimage.distance_transform_edt(~surface(prediction))[surface(truth)].mean()
    assert abs((there + back) / 2 - GOLDEN["far_metrics"][3]) > 0.1


masks = st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5)).flatmap(
    lambda shape: st.tuples(arrays.arrays(bool, shape), arrays.arrays(bool, shape))
)


@settings(max_examples=60, deadline=None)
@given(masks, st.tuples(*[st.floats(0.3, 4)] * 3))
def test_surface_distances_against_every_pair(
    pair: tuple[np.ndarray, np.ndarray], spacing: tuple[float, float, float]
) -> None:
    first, second = pair
    assert sorted(map(tuple, np.argwhere(surface(first)).tolist())) == sorted(surface_by_definition(first))
    if not (first.any() and second.any()):
        with pytest.raises(ValueError, match="empty mask"):
            surface_distances(first, second, spacing)
        return
    expected = distances_by_definition(first, second, spacing)
    np.testing.assert_allclose(np.sort(surface_distances(first, second, spacing)), expected, rtol=1e-12, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(arrays.arrays(bool, (6, 7)), arrays.arrays(bool, (6, 7)))
def test_two_dimensions(first: np.ndarray, second: np.ndarray) -> None:
    if first.any() and second.any():
        found = np.sort(surface_distances(first, second, (0.5, 2.0)))
        np.testing.assert_allclose(found, distances_by_definition(first, second, (0.5, 2.0)), rtol=1e-12, atol=1e-12)


def test_cropping_changes_nothing() -> None:
    """Class by class on boxes equals whole masks, with objects inside, touching faces, filling edges, and far apart."""
    rng = np.random.default_rng(3)
    truth = np.zeros((14, 20, 18), np.uint8)
    truth[3:9, 5:12, 4:11] = 1  # inside
    truth[0:4, 0:3, 10:18] = 2  # in a corner of the volume
    truth[10:14, :, :] = 3  # a slab that fills its end of the volume
    prediction = np.where(rng.random(truth.shape) < 0.02, rng.integers(0, 4, truth.shape), truth).astype(np.uint8)
    prediction = np.roll(prediction, 1, axis=2)
    for label, found in enumerate(measure_classes(prediction, truth, 4), start=1):
        first, second = prediction == label, truth == label
        hd95, asd = full_volume(first, second)
        whole = measure(first, second)
        assert (found.dice, found.jaccard) == (whole.dice, whole.jaccard)
        assert found.hd95 == pytest.approx(hd95, rel=1e-12, abs=1e-12)
        assert found.asd == pytest.approx(asd, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("margin", [0, 1, 3])
def test_empty_margins_change_nothing(margin: int) -> None:
    rng = np.random.default_rng(4)
    first, second = rng.random((2, 5, 6, 4)) < 0.4
    padded = measure(np.pad(first, margin), np.pad(second, margin), (2.0, 0.7, 1.1))
    plain = measure(first, second, (2.0, 0.7, 1.1))
    assert padded.hd95 == pytest.approx(plain.hd95, rel=1e-12)
    assert padded.asd == pytest.approx(plain.asd, rel=1e-12)


def test_undefined_is_none() -> None:
    empty, full = np.zeros((2, 3), bool), np.ones((2, 3), bool)
    both = measure(empty, empty)
    assert (both.dice, both.hd95, both.jaccard, both.asd) == (None, None, None, None)
    for one in (measure(empty, full), measure(full, empty)):
        assert (one.dice, one.hd95, one.jaccard, one.asd) == (0.0, None, 0.0, None)


def test_read_only_and_strided_input() -> None:
    labels = np.frombuffer(bytes([0, 1, 2, 1] * 12), np.uint8).reshape(4, 3, 4)
    flipped = labels[::-1, :, ::-1]
    assert [m.dice for m in measure_classes(labels, labels, 3)] == [1.0, 1.0]
    assert measure_classes(flipped, flipped.copy(), 3) == measure_classes(flipped.copy(), flipped, 3)


def test_errors_name_the_argument() -> None:
    labels = np.zeros((2, 3), np.uint8)
    with pytest.raises(ValueError, match=r"prediction: got shape \(2, 3\), expected \(3, 2\)"):
        measure_classes(labels, labels.T, 2)
    with pytest.raises(ValueError, match="truth: got labels 0 to 5, expected 0 to 1"):
        measure_classes(labels, np.array([[0, 5, 0], [0, 0, 0]], np.uint8), 2)
    with pytest.raises(ValueError, match=r"spacing: got .* expected 2 numbers above 0"):
        measure_classes(labels, labels, 2, (1.0, 0.0))
