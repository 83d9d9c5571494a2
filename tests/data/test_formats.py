import gzip
import sys

import h5py
import numpy as np
import pytest
from PIL import Image
from small_sets import AFFINE, write_picture, write_volume

from simmp_fast.data.errors import DataError
from simmp_fast.data.formats import NIFTI, PICTURES, extension, grey, read_image, read_label, stem, write_nifti

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (16, 12)).astype(np.uint8)
COLOUR = RNG.integers(0, 256, (16, 12, 3)).astype(np.uint8)
VOXELS = RNG.integers(-500, 500, (5, 6, 7)).astype(np.int16)


@pytest.mark.parametrize(
    ("name", "kind", "bare"), [("a.nii.gz", ".nii.gz", "a"), ("b.1.NII", ".nii", "b.1"), ("c.txt", "", "c.txt")]
)
def test_extension_and_stem(name, kind, bare):
    assert (extension(name), stem(name)) == (kind, bare)


@pytest.mark.parametrize("name", ["v.nii", "v.nii.gz"])
@pytest.mark.parametrize("kind", ["Nifti1Image", "Nifti2Image"])
def test_nifti(tmp_path, nibabel, name, kind):
    nibabel.save(getattr(nibabel, kind)(VOXELS[..., None], AFFINE), tmp_path / name)
    volume = read_image(tmp_path / name)
    assert volume.array.dtype == np.int16
    assert np.array_equal(volume.array, VOXELS)
    assert np.allclose(volume.affine, AFFINE)
    assert not volume.colour


def test_nifti_scaling_is_applied(tmp_path, nibabel):
    image = nibabel.Nifti1Image(VOXELS, AFFINE)
    image.header.set_slope_inter(0.5, -3)
    nibabel.save(image, tmp_path / "v.nii")
    array = read_image(tmp_path / "v.nii").array
    assert array.dtype == np.float32
    assert np.allclose(array, nibabel.load(tmp_path / "v.nii").get_fdata())


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tif", "a.tiff"])
@pytest.mark.parametrize("array", [GREY, COLOUR], ids=["grey", "colour"])
def test_pictures_without_loss(tmp_path, name, array):
    write_picture(tmp_path / name, array)
    volume = read_image(tmp_path / name)
    assert np.array_equal(volume.array, array)
    assert volume.array.dtype == np.uint8
    assert volume.colour == (array.ndim == 3)
    assert volume.shape == (16, 12)
    assert volume.affine is None


def test_jpeg_and_16_bit_png(tmp_path):
    write_picture(tmp_path / "a.jpg", COLOUR)
    assert read_image(tmp_path / "a.jpg").array.shape == (16, 12, 3)
    write_picture(tmp_path / "a.png", GREY.astype(np.uint16) * 200)
    assert np.array_equal(read_image(tmp_path / "a.png").array, GREY.astype(np.uint16) * 200)


def test_palettes_serve_both_ways(tmp_path):
    indices = GREY % 3
    picture = Image.fromarray(indices)
    picture.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    picture.save(tmp_path / "p.png")
    assert np.array_equal(read_label(tmp_path / "p.png").array, indices)
    assert np.array_equal(read_image(tmp_path / "p.png").array[..., 0], np.where(indices == 1, 255, 0))


def test_one_bit_pictures(tmp_path):
    Image.fromarray(GREY > 100).save(tmp_path / "b.png")
    assert np.array_equal(read_image(tmp_path / "b.png").array, np.where(GREY > 100, 255, 0))
    assert np.array_equal(read_label(tmp_path / "b.png").array, GREY > 100)


def test_npz_and_h5(tmp_path):
    image, label = VOXELS.astype(np.float32), VOXELS % 3
    np.savez(tmp_path / "c.npz", image=image[0], label=label[0])
    with h5py.File(tmp_path / "c.npy.h5", "w") as file:
        file["image"], file["label"] = image, label
    assert np.array_equal(read_image(tmp_path / "c.npz").array, image[0])
    assert np.array_equal(read_label(tmp_path / "c.npz").array, label[0])
    assert np.array_equal(read_image(tmp_path / "c.npy.h5").array, image)
    assert np.array_equal(read_label(tmp_path / "c.npy.h5").array, label)


def test_labels_are_whole_numbers_in_one_channel(tmp_path):
    write_volume(tmp_path / "ok.nii", (VOXELS % 3).astype(np.float32))
    assert np.array_equal(read_label(tmp_path / "ok.nii").array, VOXELS % 3)
    write_volume(tmp_path / "half.nii", VOXELS.astype(np.float32) + 0.5)
    with pytest.raises(DataError, match=r"half\.nii.*whole numbers"):
        read_label(tmp_path / "half.nii")
    write_picture(tmp_path / "equal.png", np.dstack([GREY] * 3))
    assert np.array_equal(read_label(tmp_path / "equal.png").array, GREY)
    write_picture(tmp_path / "colour.png", COLOUR)
    with pytest.raises(DataError, match=r"colour\.png.*one channel"):
        grey(read_image(tmp_path / "colour.png"))


def write_good(path):
    """A good file of the kind that its name says."""
    if extension(path) in NIFTI:
        write_volume(path, VOXELS)
    elif extension(path) in PICTURES:
        write_picture(path, COLOUR)
    elif extension(path) == ".npz":
        np.savez_compressed(path, image=VOXELS)
    else:
        with h5py.File(path, "w") as file:
            file["image"] = VOXELS


KINDS = ["a.nii", "a.nii.gz", "a.npz", "a.h5", "a.png", "a.jpg", "a.bmp", "a.tif"]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_truncated_files_are_named(tmp_path, name, share):
    write_good(tmp_path / name)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: int(len(content) * share)])
    with pytest.raises(DataError, match=name.replace(".", r"\.")):
        read_image(tmp_path / name)


@pytest.mark.parametrize("name", KINDS)
def test_files_of_noise_are_named(tmp_path, name):
    write_good(tmp_path / name)
    (tmp_path / name).write_bytes(RNG.bytes(3000))
    with pytest.raises(DataError, match=name.replace(".", r"\.") + ".*corrupt"):
        read_image(tmp_path / name)


@pytest.mark.parametrize("name", ["a.nii.gz", "a.npz", "a.png"])
def test_one_wrong_byte_is_found_where_the_format_has_a_checksum(tmp_path, name):
    write_good(tmp_path / name)
    content = bytearray((tmp_path / name).read_bytes())
    content[len(content) // 2] ^= 0xFF
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=name.replace(".", r"\.")):
        read_image(tmp_path / name)


def test_a_damaged_end_of_nii_gz_is_found(tmp_path):
    """The array is complete, and only the checksum behind it differs."""
    write_volume(tmp_path / "a.nii.gz", VOXELS)
    content = bytearray((tmp_path / "a.nii.gz").read_bytes())
    content[-6] ^= 0xFF
    (tmp_path / "a.nii.gz").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.nii\.gz.*corrupt"):
        read_image(tmp_path / "a.nii.gz")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_no_numbers(tmp_path, value):
    array = VOXELS.astype(np.float32)
    array[1, 2, 3] = value
    write_volume(tmp_path / "n.nii.gz", array)
    with pytest.raises(DataError, match=r"n\.nii\.gz: 1 values are NaN or infinite"):
        read_image(tmp_path / "n.nii.gz")


def test_other_files_that_cannot_be_used(tmp_path):
    with pytest.raises(DataError, match=r"none\.nii: no such file"):
        read_image(tmp_path / "none.nii")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match=r"a\.txt: unknown kind"):
        read_image(tmp_path / "a.txt")
    write_picture(tmp_path / "flat.png", np.full((4, 4), 7, np.uint8))
    with pytest.raises(DataError, match=r"flat\.png: a constant image.* 7"):
        read_image(tmp_path / "flat.png")
    np.savez(tmp_path / "keys.npz", pixels=GREY)
    with pytest.raises(DataError, match=r"keys\.npz: no array 'image' or 'img'.*pixels"):
        read_image(tmp_path / "keys.npz")
    np.savez(tmp_path / "empty.npz", image=np.zeros((0, 4)))
    with pytest.raises(DataError, match=r"empty\.npz: got an empty array"):
        read_image(tmp_path / "empty.npz")
    np.savez(tmp_path / "text.npz", image=np.array([["a", "b"]]))
    with pytest.raises(DataError, match=r"text\.npz: got values of type"):
        read_image(tmp_path / "text.npz")
    np.savez(tmp_path / "pickle.npz", image=np.array([{}, 1], dtype=object))
    with pytest.raises(DataError, match=r"pickle\.npz: got Python objects as 'image', expected numbers$"):
        read_image(tmp_path / "pickle.npz")
    write_volume(tmp_path / "four.nii", np.zeros((3, 3, 3, 2), np.int16))
    with pytest.raises(DataError, match=r"four\.nii: got an array of shape \[3, 3, 3, 2\]"):
        read_image(tmp_path / "four.nii")
    frames = [Image.fromarray(GREY), Image.fromarray(GREY)]
    frames[0].save(tmp_path / "stack.tif", save_all=True, append_images=frames[1:])
    with pytest.raises(DataError, match=r"stack\.tif: got 2 frames"):
        read_image(tmp_path / "stack.tif")


def test_an_affine_that_cannot_be_inverted(tmp_path, nibabel):
    content = bytearray(nibabel.Nifti1Image(VOXELS, AFFINE).to_bytes())
    content[280:296] = bytes(16)  # the header's srow_x, the first row of the affine
    (tmp_path / "flat.nii").write_bytes(content)
    with pytest.raises(DataError, match=r"flat\.nii: its affine"):
        read_image(tmp_path / "flat.nii")


@pytest.mark.usefixtures("nibabel")
def test_write_nifti_round_trip_and_equal_bytes(tmp_path, names):
    for name in ("x.nii", "x.nii.gz", "y.nii.gz"):
        write_nifti(tmp_path / name, VOXELS, AFFINE)
        volume = read_image(tmp_path / name)
        assert np.array_equal(volume.array, VOXELS)
        assert np.allclose(volume.affine, AFFINE)
    assert (tmp_path / "x.nii.gz").read_bytes() == (tmp_path / "y.nii.gz").read_bytes()
    assert gzip.decompress((tmp_path / "x.nii.gz").read_bytes()) == (tmp_path / "x.nii").read_bytes()
    with pytest.raises(DataError, match=r"z\.mgz.*\.nii"):
        write_nifti(tmp_path / "z.mgz", VOXELS, AFFINE)
    assert names(tmp_path) == ["x.nii", "x.nii.gz", "y.nii.gz"]


@pytest.mark.parametrize(("name", "package"), [("a.nii.gz", "nibabel"), ("a.h5", "h5py")])
def test_a_missing_library_is_named(tmp_path, monkeypatch, name, package):
    (tmp_path / name).touch()
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DataError, match=f"{name}: this kind of file needs {package}: pip install {package}"):
        read_image(tmp_path / name)
