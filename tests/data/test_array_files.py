"""npz and HDF5: axes of 1, and what is no array of numbers."""

import itertools

import h5py
import numpy as np
import pytest
from published_sets import write_arrays

from simmp_fast.data.errors import DataError
from simmp_fast.data.formats import read_image, read_label
from simmp_fast.data.sources import checked_label
from simmp_fast.data.stacks import stack_case

RNG = np.random.default_rng(0)
GREY = RNG.random((6, 7)).astype(np.float32)
STACK = RNG.random((4, 6, 7)).astype(np.float32)
COLOUR = RNG.random((6, 7, 3)).astype(np.float32)
COLOURS = RNG.random((4, 6, 7, 3)).astype(np.float32)


@pytest.mark.parametrize(
    ("stored", "expected", "colour"),
    [
        (GREY[..., None], GREY, False),
        (GREY[..., None, None], GREY, False),
        (GREY[None], GREY[None], False),
        (GREY[None, None], GREY[None], False),
        (GREY[None, ..., None], GREY[None], False),
        (STACK[..., None], STACK, False),
        (STACK[None], STACK, False),
        (STACK[:, None], STACK, False),
        (COLOUR[..., None], COLOUR, True),
        (COLOUR[:, :, None], COLOUR, True),
        (COLOUR[None], COLOUR[None], True),
        (COLOURS[None], COLOURS, True),
    ],
)
def test_axes_of_1(tmp_path, stored, expected, colour):
    for name in ("a.npz", "a.h5"):
        path = write_arrays(tmp_path / name, image=stored, label=(stored > 0.5).astype(np.uint8))
        image = read_image(path)
        assert np.array_equal(image.array, expected)
        assert image.colour == colour
        if not colour:
            assert np.array_equal(read_label(path).array, expected > 0.5)


@pytest.mark.parametrize("image", [GREY, GREY[None], GREY[..., None], GREY[None, None], COLOUR, COLOUR[None]])
def test_image_and_label_fit_whatever_axes_of_1_they_have(tmp_path, image):
    for front, behind in itertools.product((0, 1, 2), (0, 1)):
        label = (GREY > 0.5).astype(np.uint8).reshape((1,) * front + GREY.shape + (1,) * behind)
        path = write_arrays(tmp_path / "a.npz", image=image, label=label)
        loaded = read_image(path)
        labels = checked_label(loaded, read_label(path), ("no", "yes"), None, "axial")
        assert labels.shape == loaded.shape
        assert np.array_equal(labels.reshape(GREY.shape), GREY > 0.5)


def test_prepared_slices_and_volumes_with_axes_of_1(tmp_path):
    label = (GREY > 0.5).astype(np.uint8)
    files = {i: write_arrays(tmp_path / f"{i}.npz", image=GREY[None] + i, label=label[..., None]) for i in range(2)}
    image, labels = stack_case("a", files, tmp_path, ("no", "yes"), []).load()
    assert np.array_equal(image.array, [GREY, GREY + 1])
    assert np.array_equal(labels, [label, label])
    one = {None: write_arrays(tmp_path / "one.h5", image=GREY[None], label=label[None])}
    image, labels = stack_case("b", one, tmp_path, ("no", "yes"), []).load()
    assert image.shape == labels.shape == (1, 6, 7)


@pytest.mark.parametrize("name", ["a.npz", "a.h5"])
@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.float32(3), r"got image of shape \[\], expected \[h, w\] or \[d, h, w\]"),
        (np.arange(5.0), r"got image of shape \[5\]"),
        (RNG.random((2, 3, 4, 5)), r"got image of shape \[2, 3, 4, 5\]"),
        (GREY.astype(np.complex64), "got values of type complex64, expected numbers"),
        (np.zeros((3, 3), [("a", "u1"), ("b", "u1")]), "got values of type .*, expected numbers"),
        (np.array([[b"a", b"b"]]), r"got values of type \|S1, expected numbers"),
        (np.array([[0, 2**53 + 1]], np.uint64), "got the value 9007199254740993, expected at most"),
        (np.array([[0, -(2**60)]]), "got the value -1152921504606846976, expected at most"),
    ],
)
def test_what_is_no_image(tmp_path, name, array, message):
    with pytest.raises(DataError, match=rf"{name}: {message}"):
        read_image(write_arrays(tmp_path / name, image=array))


def test_npz_alone(tmp_path):
    for array in (np.array([["2020-01-01", "2021-01-01"]], "M8[D]"), np.array([["a", "b"]])):
        with pytest.raises(DataError, match=r"a\.npz: got values of type .*, expected numbers"):
            read_image(write_arrays(tmp_path / "a.npz", image=array))
    with pytest.raises(DataError, match=r"a\.npz: got Python objects as 'image', expected numbers"):
        read_image(write_arrays(tmp_path / "a.npz", image=np.array([[{}, 1]], object)))
    with open(tmp_path / "bare.npz", "wb") as file:
        np.save(file, GREY)
    with pytest.raises(DataError, match=r"bare\.npz: got one array without a name \(npy\), expected an npz file"):
        read_image(tmp_path / "bare.npz")


def test_hdf5_alone(tmp_path):
    with h5py.File(tmp_path / "g.h5", "w") as file:
        file["image/0"] = GREY
    with pytest.raises(DataError, match=r"g\.h5: got a group 'image', expected an array"):
        read_image(tmp_path / "g.h5")
    for key, value, message in [
        ("_FillValue", GREY[1, 2], r"1 values of 'image' are missing \(_FillValue = "),
        ("missing_value", GREY[1, 2], r"1 values of 'image' are missing \(missing_value = "),
        ("scale_factor", 0.5, r"got a packed array 'image' \(scale_factor\)"),
        ("add_offset", [3.0], r"got a packed array 'image' \(add_offset\)"),
    ]:
        write_arrays(tmp_path / "a.h5", image=GREY)
        with h5py.File(tmp_path / "a.h5", "a") as file:
            file["image"].attrs[key] = value
        with pytest.raises(DataError, match=rf"a\.h5: {message}"):
            read_image(tmp_path / "a.h5")
    with h5py.File(tmp_path / "a.h5", "a") as file:
        file["image"].attrs.update({"add_offset": 0.0, "_FillValue": -9999.0})
    assert np.array_equal(read_image(tmp_path / "a.h5").array, GREY)


def test_hdf5_values_that_are_not_in_the_file(tmp_path):
    """HDF5 itself makes up values of chunks that were never written, and of other files that are gone."""
    write_arrays(tmp_path / "gone.h5", image=GREY)
    layout = h5py.VirtualLayout((2, 6, 7), "f4")
    for i, name in enumerate(["gone.h5", "never.h5"]):
        layout[i] = h5py.VirtualSource(tmp_path / name, "image", (6, 7))
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("image", (4, 6, 7), "f4", chunks=(1, 4, 4), compression="gzip")[0] = GREY
        file.create_dataset("label", (4, 6, 7), "u1")
        file.create_virtual_dataset("img", layout)
    with pytest.raises(DataError, match=r"a\.h5: got an array 'image' of which 12 of 16 parts were never written"):
        read_image(tmp_path / "a.h5")
    with pytest.raises(DataError, match=r"a\.h5: got an array 'label' of which 1 of 1 parts were never written"):
        read_label(tmp_path / "a.h5")
    with h5py.File(tmp_path / "a.h5", "a") as file:
        del file["image"]
    with pytest.raises(DataError, match=r"a\.h5: got a virtual array 'img'"):
        read_image(tmp_path / "a.h5")


def test_hdf5_storage(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("image", data=STACK, chunks=(3, 4, 5), compression="gzip", shuffle=True, maxshape=(9, 9, 9))
        file.create_dataset("label", data=(STACK > 0.5).astype("i1"), fletcher32=True)
    assert np.array_equal(read_image(tmp_path / "a.h5").array, STACK)
    assert np.array_equal(read_label(tmp_path / "a.h5").array, STACK > 0.5)
    with h5py.File(tmp_path / "a.h5", "a") as file:
        file["label"].attrs["_Unsigned"] = "true"
    with pytest.raises(DataError, match=r"got a packed array 'label' \(_Unsigned\)"):
        read_label(tmp_path / "a.h5")


@pytest.mark.parametrize("name", ["a.npz", "a.h5"])
def test_booleans_are_0_and_1(tmp_path, name):
    path = write_arrays(tmp_path / name, image=GREY > 0.5, label=GREY > 0.7)
    assert read_image(path).array.dtype == np.uint8
    assert np.array_equal(read_image(path).array, GREY > 0.5)
    assert np.array_equal(read_label(path).array, GREY > 0.7)
