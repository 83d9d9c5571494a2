"""Labels as classes: any values, any order of memory."""

from pathlib import Path

import numpy as np
import pytest

from simmp_fast.data.errors import DataError
from simmp_fast.data.sources import checked_label
from simmp_fast.data.volume import Volume

CLASSES = ("none", "one", "two")


def volume(array: np.ndarray) -> Volume:
    return Volume(array, None, Path("mask"))


@pytest.mark.parametrize("values", [(0, 1, 2), (0, 128, 255), (-7, -5, 65528), (-(2**63), 0, 2**63 - 1)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_values_become_their_classes(values, order):
    """Near to one another, and further apart than a table can be long."""
    expected = np.random.default_rng(0).integers(0, 3, (4, 5, 6)).astype(np.uint8)
    label = np.asarray(np.array(values, np.int64)[expected], order=order)
    got = checked_label(volume(label), volume(label), CLASSES, dict(zip(values, range(3), strict=True)), "axial")
    assert got.dtype == np.uint8
    assert np.array_equal(got, expected)


@pytest.mark.parametrize(("strange", "listed"), [(3, "3"), (-1, "-1"), (2**40, "1099511627776")])
def test_values_that_stand_for_no_class(strange, listed):
    label = np.array([[0, 1], [strange, 2]])
    with pytest.raises(DataError, match=rf"mask \(label\): got labels {listed}, expected only 0, 1, 2 \(3 classes\)"):
        checked_label(volume(label), volume(label), CLASSES, None, "axial")
