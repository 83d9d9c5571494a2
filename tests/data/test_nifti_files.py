"""NIfTI: units, voxel sizes and affines; what a network has no use for is refused."""

import gzip

import nibabel
import numpy as np
import pytest
from small_sets import AFFINE, write_volume, write_yaml

from simmp_fast.data import DataError, prepare
from simmp_fast.data.folder import FolderSource
from simmp_fast.data.formats import read_image, read_label
from simmp_fast.data.preprocess import geometry
from simmp_fast.evaluation.label_files import write_label_map

VOXELS = np.random.default_rng(0).integers(-500, 500, (5, 6, 7)).astype(np.int16)


def save(path, array=VOXELS, affine=AFFINE, unit="mm", zooms=None, codes=(1, 1)):
    """A volume with an affine, a unit, and perhaps other voxel sides in its header; codes of sform and qform."""
    image = nibabel.Nifti1Image(array, affine)
    image.set_sform(affine, 1)
    image.set_qform(affine, 1)
    image.header.set_xyzt_units(unit)
    # Into the bytes, as nibabel sets right what contradicts itself.
    content = image.to_bytes()
    header = nibabel.Nifti1Header(content[:348], check=False)
    header["sform_code"], header["qform_code"] = codes
    if zooms is not None:
        header["pixdim"][1:4] = zooms
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header.binaryblock + content[348:])
    return path


@pytest.mark.parametrize(("unit", "millimetres"), [("unknown", 1), ("mm", 1), ("meter", 1000), ("micron", 0.001)])
@pytest.mark.parametrize("codes", [(1, 1), (0, 1), (1, 0)])
def test_units_become_millimetres(tmp_path, unit, millimetres, codes):
    volume = read_image(save(tmp_path / "a.nii", unit=unit, codes=codes))
    assert np.allclose(volume.affine[:3], AFFINE[:3] * millimetres, rtol=1e-6)
    assert volume.affine[3].tolist() == [0, 0, 0, 1]
    assert np.allclose(geometry(volume).spacing, np.array([3, 1.5, 2]) * millimetres)
    # Voxels of 50 nanometres and of 50 metres have an affine like any other.
    small = save(tmp_path / "s.nii", affine=np.diag([5e-5, 5e-5, 1e-4, 1]), unit=unit, codes=codes)
    assert np.allclose(np.diag(read_image(small).affine)[:3], np.array([5e-5, 5e-5, 1e-4]) * millimetres)


def test_a_file_without_sform_and_qform_has_its_headers_voxels(tmp_path):
    volume = read_image(save(tmp_path / "a.nii", zooms=(1, 1.25, 9), codes=(0, 0)))
    assert np.allclose(np.linalg.norm(volume.affine[:3, :3], axis=0), (1, 1.25, 9))


def test_a_unit_that_is_none(tmp_path):
    path = save(tmp_path / "a.nii")
    content = bytearray(path.read_bytes())
    content[123] = 5
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.nii: got the unit of length 5 in xyzt_units, expected 1"):
        read_image(path)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("vox_offset", 0, "got voxels from byte 0 on .*one of a pair"),  # nibabel takes the header for voxels
        ("vox_offset", 1e9, r"corrupt or truncated file \(got 772 bytes, expected 1000000420 as its header says"),
        ("dim", [3, *[32767] * 3, *[1] * 4], r"corrupt or truncated file \(got 772 bytes, expected 70362301923"),
    ],
)
def test_headers_of_other_files(tmp_path, field, value, message):
    path = save(tmp_path / "a.nii")
    content = path.read_bytes()
    header = nibabel.Nifti1Header(content[:348], check=False)
    header[field] = value
    path.write_bytes(header.binaryblock + content[348:])
    with pytest.raises(DataError, match=rf"a\.nii: {message}"):
        read_image(path)


def test_label_maps_keep_the_unit_of_their_image(tmp_path):
    source = save(tmp_path / "a.nii.gz", unit="micron")
    source.write_bytes(gzip.compress(source.read_bytes()))
    write_label_map(tmp_path / "l.nii", (VOXELS > 0).astype(np.uint8), source)
    written = nibabel.load(tmp_path / "l.nii")
    assert written.header.get_xyzt_units()[0] == "micron"
    assert np.array_equal(written.affine, nibabel.load(source).affine)
    assert np.array_equal(read_label(tmp_path / "l.nii").affine, read_image(source).affine)


@pytest.mark.parametrize("zooms", [(0, 1.5, 3), (2, -1.5, 3), (2, 1.5, np.nan), (np.inf, 1.5, 3)])
@pytest.mark.parametrize("codes", [(1, 0), (0, 0)])
def test_voxel_sides_that_are_no_lengths(tmp_path, zooms, codes):
    path = save(tmp_path / "a.nii", zooms=zooms, codes=codes)
    for read in (read_image, read_label):
        with pytest.raises(DataError, match=r"a\.nii: got voxels of .* in pixdim, expected sides above 0"):
            read(path)


def test_header_and_affine_that_disagree(tmp_path):
    path = save(tmp_path / "a.nii", zooms=(2, 1.5, 3.1))
    with pytest.raises(DataError, match=r"a\.nii: got voxels of 2 x 1\.5 x 3 mm from its .* 2 x 1\.5 x 3\.1 mm in its"):
        read_image(path)
    assert np.allclose(read_image(path, header_spacing=True).affine, AFFINE @ np.diag([1, 1, 3.1 / 3, 1]))
    assert np.allclose(read_label(path, header_spacing=True).affine, AFFINE @ np.diag([1, 1, 3.1 / 3, 1]))
    assert np.allclose(read_image(save(tmp_path / "b.nii", zooms=(2, 1.5, 3.02))).affine, AFFINE)


@pytest.mark.parametrize("column", [0, AFFINE[:3, 0]])
def test_affines_that_cannot_be_inverted(tmp_path, column):
    affine = AFFINE.copy()
    affine[:3, 1] = column
    path = save(tmp_path / "a.nii", affine=AFFINE)
    image = nibabel.load(path)
    for row, name in enumerate(("srow_x", "srow_y", "srow_z")):
        image.header[name] = affine[row]
    image.header["vox_offset"] = 352  # 0 in headers that nibabel has loaded
    path.write_bytes(image.header.binaryblock + path.read_bytes()[348:])
    with pytest.raises(DataError, match=r"a\.nii: its affine cannot be inverted"):
        read_image(path)


def test_colour_and_axes(tmp_path):
    colour = np.zeros((5, 6, 7), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    nibabel.save(nibabel.Nifti1Image(colour, AFFINE), tmp_path / "c.nii")
    with pytest.raises(DataError, match=r"c\.nii: got 3 values a voxel \(colour\), expected one"):
        read_image(tmp_path / "c.nii")
    nibabel.save(nibabel.Nifti1Image(VOXELS.astype(np.complex64), AFFINE), tmp_path / "z.nii")
    with pytest.raises(DataError, match=r"z\.nii: got values of type complex64, expected numbers"):
        read_image(tmp_path / "z.nii")
    write_volume(tmp_path / "one.nii", VOXELS[..., None, None])
    assert np.array_equal(read_image(tmp_path / "one.nii").array, VOXELS)


@pytest.mark.parametrize("value", [-1e308, 1e39])
def test_numbers_beyond_float32(tmp_path, value):
    array = VOXELS.astype(np.float64)
    array[1, 2, 3] = value
    write_volume(tmp_path / "a.nii", array)
    with pytest.raises(DataError, match=rf"a\.nii: got the value {value:g}".replace("+", r"\+")):
        read_image(tmp_path / "a.nii")


def test_float64_stays_where_float32_would_change_it(tmp_path):
    write_volume(tmp_path / "fine.nii", 1e9 + VOXELS / 4)
    assert np.array_equal(read_image(tmp_path / "fine.nii").array, 1e9 + VOXELS / 4)
    write_volume(tmp_path / "coarse.nii", VOXELS / 4)
    assert read_image(tmp_path / "coarse.nii").array.dtype == np.float32


def turned(degrees):
    """AFFINE, turned around the head's axis."""
    angle = np.deg2rad(degrees)
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    return turn @ AFFINE


def moved(*millimetres):
    affine = AFFINE.copy()
    affine[:3, 3] += millimetres
    return affine


@pytest.mark.parametrize(
    ("affine", "message"),
    [
        (
            moved(0, 0, 3),
            r"up to 3 mm away .* \(by \[0\.0, 0\.0, 3\.0\] mm to the right, front and head\), .* of 1\.5 mm",
        ),
        (
            moved(-40, 30, 0),
            r"up to 50 mm away .*by \[-40\.0, 30\.0, 0\.0\].*origins are \[-50\.0, 50\.0, 5\.0\] and \[",
        ),
        (moved(0.2, 0, 0), r"up to 0\.2 mm away .*expected at most 0\.1 of a voxel side of 1\.5 mm"),
        (turned(40), r"up to .* mm away"),
        (AFFINE @ np.diag([1.009, 1, 1, 1]), r"up to 0\.324 mm away"),
        (AFFINE @ np.diag([1.02, 1, 1, 1]), r"got spacing \[3\.0, 1\.5, 2\.04\] mm, expected \[3\.0, 1\.5, 2\.0\]"),
        (AFFINE @ np.diag([-1, 1, 1, 1]), r"its axes run in other directions"),
    ],
)
def test_a_mask_that_lies_elsewhere(tmp_path, affine, message):
    array = np.random.default_rng(1).integers(0, 500, (19, 8, 5)).astype(np.int16)
    write_volume(tmp_path / "images" / "a.nii.gz", array)
    write_volume(tmp_path / "masks" / "a.nii.gz", (array > 200).astype(np.uint8), affine)
    source = FolderSource(write_yaml(tmp_path / "s.yaml", name="s", classes=["no", "yes"]))
    with pytest.raises(DataError, match=r"masks/a\.nii\.gz: .*" + message):
        source.cases[0].load()


@pytest.mark.parametrize("affine", [moved(0.1, 0.05, 0), AFFINE * (1 + 1e-6), turned(0.05)])
def test_a_mask_that_rounding_has_moved(tmp_path, affine):
    write_volume(tmp_path / "images" / "a.nii.gz", VOXELS)
    write_volume(tmp_path / "masks" / "a.nii.gz", (VOXELS > 200).astype(np.uint8), affine)
    source = FolderSource(write_yaml(tmp_path / "s.yaml", name="s", classes=["no", "yes"]))
    assert np.array_equal(source.cases[0].load()[1], VOXELS > 200)


def test_one_of_the_two_states_no_place(tmp_path):
    write_volume(tmp_path / "images" / "a.nii.gz", VOXELS)
    (tmp_path / "masks").mkdir()
    np.savez(tmp_path / "masks" / "a.npz", label=VOXELS > 200)
    source = FolderSource(write_yaml(tmp_path / "s.yaml", name="s", classes=["no", "yes"]))
    assert np.array_equal(source.cases[0].load()[1], VOXELS > 200)


def test_microns_reach_the_cache_as_millimetres(tmp_path):
    for name in "abc":
        array = np.random.default_rng(ord(name)).integers(0, 99, (5, 6, 7)).astype(np.int16)
        save(tmp_path / "images" / f"{name}.nii", array, unit="micron")
        save(
            tmp_path / "masks" / f"{name}.nii", (array > 50).astype(np.uint8), AFFINE @ np.diag([1, 1, 1, 1]), "micron"
        )
    source = FolderSource(write_yaml(tmp_path / "s.yaml", name="s", classes=["no", "yes"]))
    cache = prepare(source, tmp_path / "out", 32, progress=False)
    assert np.allclose(cache.case("a").spacing, [0.003, 0.0015, 0.002])


@pytest.mark.filterwarnings("error")
def test_an_affine_whose_lengths_overflow_is_refused_without_a_warning(tmp_path):
    image = nibabel.Nifti2Image(VOXELS, AFFINE)
    content = image.to_bytes()
    header = nibabel.Nifti2Header(content[:540], check=False)
    header["sform_code"], header["srow_x"] = 1, (1e200, 0, 0, 0)
    path = tmp_path / "a.nii"
    path.write_bytes(header.binaryblock + content[540:])
    with pytest.raises(DataError, match=r"a\.nii: its affine cannot be inverted"):
        read_image(path)
