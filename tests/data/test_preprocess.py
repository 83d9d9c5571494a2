import itertools

import numpy as np
import pytest
from scipy import ndimage
from small_sets import AFFINE

from simmp_fast.config import ConfigError, from_mapping, to_mapping
from simmp_fast.data.errors import DataError
from simmp_fast.data.formats import Volume
from simmp_fast.data.preprocess import (
    SLICE_AXES,
    Geometry,
    Intensity,
    Recipe,
    from_slices,
    geometry,
    network_input,
    resize_image,
    resize_label,
    to_slices,
)

RNG = np.random.default_rng(0)
VOXELS = RNG.integers(0, 1000, (4, 5, 6)).astype(np.int16)
ALL_ORDERS = [
    np.column_stack([order, signs])
    for order in itertools.permutations(range(3))
    for signs in itertools.product((1, -1), repeat=3)
]


def volume(array, affine=None, colour=False):
    return Volume(array, affine, "file.nii", colour)


@pytest.mark.parametrize("slice_axis", SLICE_AXES)
@pytest.mark.parametrize("oblique", [False, True])
def test_every_axis_order_and_direction_gives_the_same_slices(nibabel, slice_axis, oblique):
    """48 copies of one volume, with the affine that keeps every voxel where it is in space."""
    affine = AFFINE.copy()
    if oblique:
        turn = np.deg2rad(20)
        around_z = np.array([[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]])
        affine[:3, :3] = around_z @ affine[:3, :3]
    placed = geometry(volume(VOXELS, affine), slice_axis)
    expected = to_slices(VOXELS, placed)
    for order in ALL_ORDERS:
        copy = nibabel.orientations.apply_orientation(VOXELS, order)
        copy_affine = affine @ nibabel.orientations.inv_ornt_aff(order, VOXELS.shape)
        copy_placed = geometry(volume(copy, copy_affine), slice_axis)
        slices = to_slices(copy, copy_placed)
        assert np.array_equal(slices, expected)
        assert copy_placed.slice_shape == expected.shape
        assert np.allclose(copy_placed.spacing, placed.spacing)
        assert np.array_equal(from_slices(slices, copy_placed), copy)


def test_slices_are_shown_as_radiologists_see_them(nibabel):
    """Rows of an axial slice go from front to back, columns from the patient's right to left."""
    array = np.zeros((4, 5, 6), np.int16)
    array[3, 4, 0] = 1  # rightmost, foremost, lowest (the affine grows to the right, to the front and up)
    ((index, row, column),) = np.argwhere(to_slices(array, geometry(volume(array, AFFINE), "axial")))
    assert (index, row, column) == (0, 0, 0)
    assert geometry(volume(array, AFFINE), "axial").spacing == (3.0, 1.5, 2.0)
    assert geometry(volume(array, AFFINE), "sagittal").slice_shape == (4, 6, 5)
    assert nibabel.aff2axcodes(AFFINE) == ("R", "A", "S")


@pytest.mark.parametrize(("shape", "colour"), [((7, 8), False), ((7, 8, 3), True), ((2, 7, 8), False)])
def test_files_without_orientation_keep_their_order(shape, colour):
    array = RNG.integers(0, 256, shape).astype(np.uint8)
    placed = geometry(volume(array, colour=colour))
    slices = to_slices(array, placed)
    assert slices.shape[:3] == placed.slice_shape
    assert np.array_equal(slices.reshape(shape), array)
    assert np.array_equal(
        from_slices(slices[:, ..., 0] if colour else slices, placed), array[..., 0] if colour else array
    )


def test_from_slices_refuses_another_shape():
    with pytest.raises(ValueError, match=r"slices: got shape \[2, 3, 4\], expected \[1, 3, 4\]"):
        from_slices(np.zeros((2, 3, 4)), Geometry((3, 4)))


@pytest.mark.usefixtures("nibabel")
def test_geometry_survives_json():
    placed = geometry(volume(VOXELS, AFFINE), "coronal")
    assert from_mapping(Geometry, to_mapping(placed)) == placed


def test_intensity_rules():
    array = np.array([-50, 0, 50, 100, 200], np.int16)
    assert np.allclose(Intensity("window", 0, 100).apply(volume(array)), [0, 0, 0.5, 1, 1])
    assert np.allclose(Intensity("range", -50, 200).apply(volume(array)), (array + 50) / 250)
    assert np.allclose(Intensity("percentile", 25, 75).apply(volume(array)), [0, 0, 0.5, 1, 1])
    assert Intensity("window", 0, 100).apply(volume(array)).dtype == np.float32
    with pytest.raises(DataError, match=r"file\.nii: got values from -50 to 200, expected 0 to 100"):
        Intensity("range", 0, 100).apply(volume(array))
    nearly = np.zeros(1000)
    nearly[0] = 1
    with pytest.raises(DataError, match=r"file\.nii: percentiles .* both 0\.0"):
        Intensity("percentile", 1, 99).apply(volume(nearly))


F32 = np.finfo(np.float32)


@pytest.mark.parametrize("rule", ["range", "window"])
@pytest.mark.parametrize(
    ("values", "low", "high"), [((0, 0.5, 1), 0, 255), ((100, 101, 102), -500, 500), ((254, 254.5, 255), 0, 255)]
)
def test_values_in_another_unit_than_the_rule(rule, values, low, high):
    """The network would see one grey value."""
    found = (
        rf"file\.nii: got values from {values[0]:g} to {values[2]:g}, .* in the {rule} {low} to {high}; set intensity"
    )
    for dtype in (np.float32, np.float64):
        with pytest.raises(DataError, match=found):
            Intensity(rule, low, high).apply(volume(np.array([values], dtype)))
    assert Intensity(rule, low, high).apply(volume(np.array([*values, (low + high) / 2]))).max() > 0


def test_values_all_outside_a_window():
    with pytest.raises(DataError, match=r"file\.nii: got values from 40000 to 60000, .*the window -125 to 275"):
        Intensity("window", -125, 275).apply(volume(np.array([40000, 60000], np.uint16)))


@pytest.mark.parametrize(
    ("array", "rule", "expected"),
    [
        (np.array([F32.min, 0, F32.max], np.float32), ("range", float(F32.min) / 2, float(F32.max) / 2), None),
        (np.array([F32.min, 0, F32.max], np.float32), ("percentile", 0, 100), [0, 0.5, 1]),
        (np.array([F32.min, F32.max] * 4, np.float32), ("percentile", 0, 50), [0, 1] * 4),
        (np.array([F32.min, 0, 100], np.float32), ("window", 0, 100), [0, 0, 1]),
        (np.array([-65504, 0, 65504], np.float16), ("percentile", 0, 100), [0, 0.5, 1]),
        (np.array([-65504, 65504] * 4, np.float16), ("percentile", 0, 50), [0, 1] * 4),
        (np.array([-30000, 30000] * 4, np.int16), ("percentile", 0, 50), [0, 1] * 4),
        (10**9 + np.array([0, 1, 2, 3, 4]), ("range", 10**9, 10**9 + 4), [0, 0.25, 0.5, 0.75, 1]),
        (10.0**9 + np.array([0, 1, 2, 3, 4]), ("percentile", 0, 100), [0, 0.25, 0.5, 0.75, 1]),
        (np.array([1, 2, 3]) * 1e-44, ("percentile", 0, 100), None),
        (np.array([0, 1, 2, 4]) * 1e-36, ("percentile", 0, 100), [0, 0.25, 0.5, 1]),
        (np.array([0, 255, 2**52], np.int64), ("window", 0, 255), [0, 1, 1]),
    ],
)
@pytest.mark.filterwarnings("error")
def test_extreme_values(array, rule, expected):
    if expected is None:
        with pytest.raises(DataError, match=r"file\.nii"):
            Intensity(*rule).apply(volume(array))
        return
    got = Intensity(*rule).apply(volume(array))
    assert got.dtype == np.float32
    middle = [0, 1] * 4 if rule == ("percentile", 0, 50) else expected
    assert np.allclose(got, middle, atol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("rule", ["window", "percentile"])
def test_what_leaves_an_intensity_rule_is_finite(rule, value):
    with pytest.raises(DataError, match=r"file\.nii: got values from .*, expected finite numbers"):
        Intensity(rule, 0, 100).apply(volume(np.array([0, 1, value])))


def test_both_orders_of_memory_give_the_same():
    array = RNG.integers(0, 255, (4, 5, 6)).astype(np.int16)
    by_rows, by_columns = (Intensity("range", 0, 255).apply(volume(np.array(array, order=o))) for o in "CF")
    assert np.array_equal(by_rows, by_columns)
    assert by_columns.flags.f_contiguous


@pytest.mark.parametrize(
    ("rule", "low", "high"),
    [
        ("zscore", 0, 1), ("window", 5, 5), ("percentile", 1, 101), ("window", float("nan"), 1),
        ("range", 0, float("inf")), ("range", -float("inf"), 0), ("window", 0, float("nan")), ("window", -3e38, 3e38),
        ("range", 0, 1e-39), ("range", 0, 1e39), ("range", 0, 10**400),
    ],
)  # fmt: skip
def test_intensity_refuses(rule, low, high):
    with pytest.raises(ConfigError, match="intensity"):
        Intensity(rule, low, high)


@pytest.mark.parametrize(("height", "width", "size"), [(20, 31, 16), (10, 7, 32), (1, 5, 8), (64, 64, 32)])
def test_resize_image_is_the_cubic_zoom(height, width, size):
    image = RNG.random((2, height, width)).astype(np.float32)
    got = resize_image(image, size)
    assert got.shape == (2, size, size)
    assert got.dtype == np.float32
    assert got.min() >= 0
    assert got.max() <= 1
    expected = np.stack([ndimage.zoom(c, (size / height, size / width), order=3) for c in image]).clip(0, 1)
    assert np.allclose(got, expected, atol=1e-6)


def test_resize_image_keeps_the_far_edge():
    """Where scipy's default reads zeros in the last row and column."""
    assert np.allclose(resize_image(np.ones((1, 63, 63), np.float32), 16), 1, atol=1e-5)


def test_resize_label_is_the_nearest_zoom():
    for source, target in itertools.product((1, 2, 5, 16, 63, 100), (1, 2, 8, 16, 37, 128)):
        label = RNG.integers(0, 5, (source, 2 * source)).astype(np.uint8)
        factors = (target / source, (target + 3) / (2 * source))
        expected = ndimage.zoom(label, factors, order=0, mode="mirror")
        assert np.array_equal(resize_label(label, (target, target + 3)), expected), (source, target)
    stack = RNG.integers(0, 5, (3, 6, 7)).astype(np.uint8)
    assert np.array_equal(resize_label(stack, (9, 4))[1], resize_label(stack[1], (9, 4)))


def recipe(**keys):
    return Recipe(**{"name": "x", "classes": ("a", "b"), "channels": 1, "image_size": 16} | keys)


@pytest.mark.usefixtures("nibabel")
def test_network_input():
    window = Intensity("window", 0, 1000)
    images, placed = network_input(volume(VOXELS, AFFINE), recipe(intensity=window))
    assert images.shape == (6, 1, 16, 16)
    assert images.dtype == np.float32
    assert placed.slice_shape == (6, 5, 4)
    expected = resize_image(to_slices(VOXELS, placed)[2][None] / np.float32(1000), 16)
    assert np.allclose(images[2], expected, atol=1e-6)
    three, _ = network_input(volume(VOXELS, AFFINE), recipe(intensity=window, channels=3))
    assert three.shape == (6, 3, 16, 16)
    assert np.array_equal(three[:, 1], images[:, 0])
    picture = RNG.integers(0, 256, (9, 8, 3)).astype(np.uint8)
    colour, _ = network_input(volume(picture, colour=True), recipe(channels=3, intensity=Intensity("range", 0, 255)))
    assert colour.shape == (1, 3, 16, 16)
    assert np.allclose(colour[0, 2], resize_image(picture[None, ..., 2] / np.float32(255), 16), atol=1e-6)
    with pytest.raises(DataError, match="one channel"):
        network_input(volume(picture, colour=True), recipe(intensity=Intensity("range", 0, 255)))


@pytest.mark.parametrize(
    ("key", "value"),
    [("channels", 2), ("classes", ("a",)), ("classes", ("a", "a")), ("slice_axis", "z"), ("image_size", 0)],
)
def test_recipe_refuses(key, value):
    with pytest.raises(ConfigError, match=key):
        recipe(**({"intensity": Intensity("range", 0, 1)} | {key: value}))
