"""Synapse in its two layouts, with the published cases and numbers of slices."""

import shutil

import numpy as np
import pytest
from published_sets import (
    AFFINE,
    SIDE,
    TEST_DEPTH,
    assert_named_once,
    refusal,
    write_arrays,
    write_nifti,
    write_synapse_prepared,
    write_synapse_raw,
)

from simmp_fast.data import DataError, Intensity, open_source, prepare
from simmp_fast.data.formats import read_image, read_label

CLASSES = [
    "background",
    "aorta",
    "gallbladder",
    "left kidney",
    "right kidney",
    "liver",
    "pancreas",
    "spleen",
    "stomach",
]
RNG = np.random.default_rng(9)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("prepared")
    write_synapse_prepared(root)
    return root


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    root = tmp_path_factory.mktemp("raw")
    write_synapse_raw(root)
    return root


@pytest.fixture
def prepared_copy(prepared, tmp_path):
    return shutil.copytree(prepared, tmp_path / "prepared")


@pytest.fixture
def raw_copy(raw, tmp_path):
    return shutil.copytree(raw, tmp_path / "raw")


def test_prepared_slices_and_volumes(prepared, tmp_path):
    cache = prepare(open_source("synapse", prepared), tmp_path / "out", SIDE)
    assert cache.classes == CLASSES
    assert [len(ids) for ids in cache.splits.values()] == [18, 0, 12]
    assert len(cache.split_slices("train")) == 2211
    assert cache.recipe.intensity == Intensity("range", 0, 1)
    case = cache.case("case0005")
    assert case.source == "train_npz/case0005_slice000.npz (117 slices)"
    for index in (0, 9, 10, 116):
        path = prepared / "train_npz" / f"case0005_slice{index:03d}.npz"
        assert np.array_equal(case.images[index, 0], read_image(path).array.astype(np.float16))
        assert np.array_equal(case.native_labels()[index], read_label(path).array)
    path = prepared / "test_vol_h5" / "case0001.npy.h5"
    case = cache.case("case0001")
    assert case.native_shape == (TEST_DEPTH, SIDE, SIDE)
    assert np.array_equal(case.images[:, 0], read_image(path).array.astype(np.float16))
    assert np.array_equal(case.native_labels(), read_label(path).array)
    assert not case.geometry.has_spacing


def test_raw_volumes(raw, tmp_path):
    cache = prepare(open_source("synapse", raw), tmp_path / "out", SIDE)
    assert cache.classes == CLASSES
    assert [len(ids) for ids in cache.splits.values()] == [18, 0, 12]
    assert len(cache.split_slices("train")) == 2211
    case = cache.case("case0005")
    assert case.source == "img/img0005.nii.gz"
    assert case.geometry.has_spacing
    assert np.allclose(case.spacing, (3, 0.7, 0.8))
    assert np.allclose(case.geometry.affine, AFFINE)
    # Slices [z, y, x] as pictures show them: y and x run against the file's axes.
    image = read_image(raw / "img" / "img0005.nii.gz").array.transpose(2, 1, 0)[:, ::-1, ::-1]
    label = read_label(raw / "label" / "label0005.nii.gz").array.transpose(2, 1, 0)[:, ::-1, ::-1]
    window = (np.clip(image, -125, 275) + 125) / 400
    assert np.abs(case.images[:, 0] - window).max() < 1e-3
    released = {0: 0, 1: 7, 2: 4, 3: 3, 4: 2, 5: 0, 6: 5, 7: 8, 8: 1, 9: 0, 10: 0, 11: 6, 12: 0, 13: 0}
    assert np.array_equal(case.native_labels(), np.vectorize(released.get)(label))


def test_a_case_in_both_forms(prepared_copy):
    """Slices are for training, volumes for the test."""
    image, label = np.zeros((117, SIDE, SIDE), np.float32), np.zeros((117, SIDE, SIDE), np.uint8)
    write_arrays(prepared_copy / "more" / "case0005.npy.h5", image=image, label=label)
    write_arrays(prepared_copy / "more" / "case0001_slice000.npz", image=image[0], label=label[0])
    sources = {case.id: case.source for case in open_source("synapse", prepared_copy).cases}
    assert sources["case0005"] == "train_npz/case0005_slice000.npz (117 slices)"
    assert sources["case0001"] == "test_vol_h5/case0001.npy.h5"


def test_cases_that_the_split_does_not_name_are_left_alone(raw_copy, tmp_path):
    write_nifti(raw_copy / "img" / "img0061.nii.gz", np.zeros((2, 2, 2), np.int16))
    assert open_source("synapse", raw_copy).problems == ()


def test_every_bad_prepared_file_is_named(prepared_copy):
    train, test = prepared_copy / "train_npz", prepared_copy / "test_vol_h5"
    image, label = RNG.random((SIDE, SIDE), np.float32), np.zeros((SIDE, SIDE), np.uint8)
    (train / "case0006_slice003.npz").unlink()
    (train / "case0006_slice130.npz").unlink()
    write_arrays(train / "case0007_slice163.npz", image=image, label=label)
    for file in train.glob("case0009_*"):
        file.unlink()
    (test / "case0001.npy.h5").unlink()
    shutil.copytree(train, prepared_copy / "again", ignore=lambda _, names: set(names) - {"case0010_slice000.npz"})
    write_arrays(train / "case0021_slice000.npz", image=image, label=label + 9)
    write_arrays(train / "case0021_slice001.npz", image=image, label=label + 13)
    write_arrays(train / "case0023_slice000.npz", image=image * 300, label=label)
    write_arrays(train / "case0024_slice000.npz", image=image[:4], label=label[:4])
    write_arrays(train / "case0026_slice000.npz", image=image)
    write_arrays(train / "case0027_slice000.npz", image=np.stack([image] * 2), label=np.stack([label] * 2))
    write_arrays(test / "case0002.npy.h5", image=image, label=label)
    expected = [
        "train_npz/case0010_slice000.npz: has the same id as ",
        "case0009: no file of this case, which the split names",
        "case0001: no file of this case, which the split names",
        "case0006: no file of slices 3, 130 (2 of 0 to 130 are missing)",
        "train_npz/case0007_slice163.npz: a slice that the split has not, expected 0 to 162",
        "train_npz/case0021_slice000.npz (label): got labels 9, expected only 0, 1, 2, 3, 4, 5, 6, 7, 8",
        "train_npz/case0021_slice001.npz (label): got labels 13, expected only 0, 1, 2, 3, 4, 5, 6, 7, 8",
        "train_npz/case0023 (slices): got values from ",
        "train_npz/case0024_slice000.npz: got shape [4, 8], expected [8, 8] as most slices of the case have",
        "train_npz/case0026_slice000.npz: no array 'label' in the file, got image",
        "train_npz/case0027_slice000.npz: got an image of shape [2, 8, 8], expected [h, w]",
        "test_vol_h5/case0002.npy.h5: got an image of shape [8, 8], expected [d, h, w]",
    ]
    assert_named_once(refusal("synapse", prepared_copy), expected, first=True)


def test_every_bad_raw_file_is_named(raw_copy):
    img, label = raw_copy / "img", raw_copy / "label"
    (label / "label0005.nii.gz").unlink()
    (img / "img0006.nii.gz").unlink()
    (img / "img0007.nii.gz").unlink()
    (label / "label0007.nii.gz").unlink()
    shutil.copy(img / "img0009.nii.gz", raw_copy / "img0009.nii.gz")
    write_nifti(label / "label0010.nii.gz", np.full((SIDE, SIDE, 148), 14, np.uint8))
    write_nifti(label / "label0021.nii.gz", np.full((SIDE, SIDE, 143), 8, np.uint8))
    write_nifti(img / "img0023.nii.gz", RNG.integers(0, 99, (SIDE, SIDE, 95)).astype(np.int16))
    write_nifti(label / "label0023.nii.gz", np.full((SIDE, SIDE, 95), 13, np.uint8))
    write_nifti(label / "label0024.nii.gz", np.full((SIDE, SIDE, 9), 13, np.uint8))
    expected = [
        "img0009.nii.gz: has the same id '0009' as ",
        "img/img0005.nii.gz: an image without a mask (id '0005')",
        "label/label0006.nii.gz: a mask without an image (id '0006')",
        "id '0007': neither image nor mask, expected both as the split names it",
        "label/label0010.nii.gz: got labels 14, expected only 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13",
        "label/label0021.nii.gz: got no label above 8, expected the raw labels 1 to 13",
        "img/img0023.nii.gz: got 95 slices, expected 96 as the split says",
        "label/label0024.nii.gz: got shape [8, 8, 9], expected [8, 8, 124]",
    ]
    assert_named_once(refusal("synapse", raw_copy), expected)


def test_a_training_volume_of_another_depth(prepared_copy):
    for file in (prepared_copy / "train_npz").glob("case0005_*"):
        file.unlink()
    image = RNG.random((4, SIDE, SIDE), np.float32)
    write_arrays(prepared_copy / "case0005.npy.h5", image=image, label=np.zeros(image.shape, np.uint8))
    assert refusal("synapse", prepared_copy) == ["case0005.npy.h5: got 4 slices, expected 117 as the split says"]


def test_folders_that_hold_something_else(raw, prepared_copy, tmp_path):
    with pytest.raises(DataError, match="nowhere: no such folder"):
        open_source("synapse", tmp_path / "nowhere")
    (tmp_path / "other").mkdir()
    with pytest.raises(DataError, match=r"other: looked for case0005_slice000\.npz .* found nothing"):
        open_source("synapse", tmp_path / "other")
    for i in range(9):
        (tmp_path / "other" / f"scan{i}.dcm").touch()
    with pytest.raises(DataError, match=r"found scan0\.dcm, .*scan7\.dcm, \.\.\. \(9 names\)"):
        open_source("synapse", tmp_path / "other")
    shutil.copytree(raw / "img", prepared_copy / "img")
    with pytest.raises(DataError, match="holds prepared and raw files, expected one of the two"):
        open_source("synapse", prepared_copy)
