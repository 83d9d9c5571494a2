import numpy as np
import pytest
from scipy import ndimage

from simmp_fast.data.augment import DEGREES, augment, rotate

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("shape", [(64, 64), (37, 50)])
def test_rotate_equals_scipy_at_every_angle(shape):
    for degrees in DEGREES:
        for plane in (RNG.integers(1, 256, shape).astype(np.uint8), RNG.random(shape).astype(np.float16)):
            expected = ndimage.rotate(plane.astype(np.float64), degrees, reshape=False, order=0)
            assert np.array_equal(rotate(plane, degrees), expected), degrees
            assert rotate(plane, degrees).dtype == plane.dtype


def test_rotate_at_the_size_of_the_network():
    image = RNG.integers(1, 256, (2, 256, 256)).astype(np.uint8)
    for degrees in (-20, -7, 3, 19):
        expected = np.stack([ndimage.rotate(plane, degrees, reshape=False, order=0) for plane in image])
        assert np.array_equal(rotate(image, degrees), expected)


def which(image, moved):
    """The one transform that takes `image` to `moved`: (kind, parameters)."""
    if np.array_equal(moved, image):
        return "none"
    for degrees in DEGREES:
        if np.array_equal(moved, rotate(image, degrees)):
            return "rotation"
    for turns in range(4):
        for axis in (1, 2):
            if np.array_equal(moved, np.flip(np.rot90(image, turns, (1, 2)), axis)):
                return "turn and flip"
    return "unknown"


def test_shares_of_the_transforms_and_labels_that_follow():
    image = RNG.random((2, 12, 12)).astype(np.float32) + 1
    label = RNG.integers(0, 4, (12, 12)).astype(np.uint8)
    before = image.copy(), label.copy()
    both = np.concatenate([image, label[None]])
    counts = {"none": 0, "rotation": 0, "turn and flip": 0}
    for seed in range(400):
        moved, moved_label = augment(image, label, np.random.default_rng(seed))
        assert moved.shape == image.shape
        assert moved_label.shape == label.shape
        assert moved.dtype == image.dtype
        assert moved_label.dtype == label.dtype
        counts[which(both, np.concatenate([moved, moved_label[None]]))] += 1
    assert np.array_equal(image, before[0])
    assert np.array_equal(label, before[1])
    # A binomial of 400 draws: four standard deviations are 40 at p 1/2 and 35 at p 1/4; a rotation by 0 counts as none.
    assert abs(counts["turn and flip"] - 200) <= 40
    assert abs(counts["rotation"] - 100) <= 35


def test_equal_seeds_give_equal_draws():
    image, label = RNG.random((1, 16, 16)), RNG.integers(0, 4, (16, 16))
    for seed in range(20):
        first, second = (augment(image, label, np.random.default_rng((seed, 1))) for _ in range(2))
        assert np.array_equal(first[0], second[0])
        assert np.array_equal(first[1], second[1])
