"""ACDC as raw frames and as the prepared files of the three splits."""

import shutil

import numpy as np
import pytest
from published_sets import (
    SIDE,
    assert_named_once,
    refusal,
    write_acdc_prepared,
    write_acdc_raw,
    write_arrays,
    write_nifti,
)

from simmp_fast.config import ConfigError
from simmp_fast.data import DataError, Intensity, acdc, open_source, prepare
from simmp_fast.data.formats import read_image, read_label

CLASSES = ["background", "right ventricle", "myocardium", "left ventricle"]
CASES = {"released": [160, 0, 40], "mt_unet": [140, 20, 40], "ssl4mis": [140, 20, 40]}


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    root = tmp_path_factory.mktemp("raw")
    write_acdc_raw(root)
    return root


@pytest.fixture
def raw_copy(raw, tmp_path):
    return shutil.copytree(raw, tmp_path / "raw")


@pytest.fixture
def mt_unet(tmp_path):
    write_acdc_prepared(tmp_path / "mt_unet", "mt_unet")
    return tmp_path / "mt_unet"


def sizes(splits):
    return [len(ids) for ids in splits.values()]


def test_raw_frames(raw, tmp_path):
    cache = prepare(open_source("acdc", raw), tmp_path / "out", SIDE)
    assert cache.classes == CLASSES
    assert cache.recipe.intensity == Intensity("percentile", 0.5, 99.5)
    assert sizes(cache.splits) == [160, 0, 40]
    assert cache.splits["test"][:2] == ["patient008_frame01", "patient008_frame12"]
    case = cache.case("patient008_frame12")
    assert case.source == "training/patient008/patient008_frame12.nii.gz"
    assert case.spacing == (10, 1.25, 1.5), "the header's voxel size, not the sform's"
    assert case.geometry.affine == ((-1.5, 0, 0, 0), (0, -1.25, 0, 0), (0, 0, 10, 0), (0, 0, 0, 1))
    path = raw / "training" / "patient008" / "patient008_frame12_gt.nii.gz"
    assert np.array_equal(case.native_labels(), read_label(path).array.transpose(2, 1, 0))


def test_the_three_splits_of_the_raw_frames(raw):
    held_out = {}
    for split, need in CASES.items():
        parts = open_source("acdc", raw, split).splits()
        assert sizes(parts) == need
        assert len({i for ids in parts.values() for i in ids}) == 200
        held_out[split] = {int(i[7:10]) for i in parts["test"]}
    assert len(set.union(*held_out.values())) > 40, "they differ"
    assert open_source("acdc", raw).splits() == open_source("acdc", raw, "released").splits()
    assert 8 in held_out["released"]
    assert 2 in held_out["mt_unet"]
    assert 1 in held_out["ssl4mis"]


@pytest.mark.parametrize(
    ("split", "case_id", "first"),
    [
        ("released", "patient001_frame12", "train/patient001_frame120.npz"),
        ("mt_unet", "patient001_ES", "train/case_001_sliceES_0.npz"),
        ("ssl4mis", "patient003_frame02", "data/slices/patient003_frame02_slice_1.h5"),
    ],
)
def test_prepared_files(tmp_path, split, case_id, first):
    root = tmp_path / "set"
    write_acdc_prepared(root, split)
    cache = prepare(open_source("acdc", root, split), tmp_path / "out", SIDE)
    assert sizes(cache.splits) == CASES[split]
    assert len(cache.split_slices("train")) == acdc.SPLITS[split]["train_slices"]
    assert len(cache.split_slices("test")) == 120
    assert cache.recipe.intensity == Intensity("percentile", 0, 100)
    case = cache.case(case_id)
    assert case.source == f"{first} ({case.slices} slices)"
    assert np.array_equal(case.native_labels()[0], read_label(root / first).array)
    image = np.stack([read_image(root / first.replace("0.npz", f"{i}.npz").replace("1.h5", f"{i + 1}.h5")).array
                      for i in range(case.slices)])  # fmt: skip
    scaled = (image - image.min()) / (image.max() - image.min())
    assert np.abs(case.images[:, 0] - scaled).max() < 1e-3
    assert not case.geometry.has_spacing


def test_ten_and_more_slices_come_in_order(tmp_path):
    """In the released names the slice number follows the frame number without a mark: frame011 ... frame0110."""
    write_acdc_prepared(tmp_path, "released")
    source = open_source("acdc", tmp_path)
    case = next(case for case in source.cases if case.id == "patient001_frame01")
    _, labels = case.load()
    assert len(labels) == 12
    for i in (1, 10, 11):
        assert np.array_equal(labels[i], read_label(tmp_path / "train" / f"patient001_frame01{i}.npz").array)


def test_a_split_that_does_not_exist(raw):
    with pytest.raises(ConfigError, match="split: got 'mine', expected one of released, mt_unet, ssl4mis"):
        open_source("acdc", raw, "mine")


def test_every_bad_raw_file_is_named(raw_copy):
    def frame(patient, ending):
        return raw_copy / "training" / f"patient{patient:03d}" / f"patient{patient:03d}_frame{ending}.nii.gz"

    frame(1, "12_gt").unlink()
    frame(2, "12").unlink()
    frame(3, "12").unlink()
    frame(3, "12_gt").unlink()
    shutil.rmtree(frame(4, "01").parent)
    shutil.copy(frame(5, "01"), raw_copy)
    write_nifti(frame(6, "01_gt"), np.full((SIDE, SIDE, 3), 4, np.uint8), np.diag([-1.5, -1.25, 10, 1]))
    write_nifti(frame(7, "01_gt"), np.full((SIDE, SIDE, 3), 3, np.uint8), np.diag([-1.5, -1.5, 10, 1]))
    shutil.copy(frame(8, "01"), frame(8, "05"))
    shutil.copy(frame(8, "01_gt"), frame(8, "05_gt"))
    expected = [
        "patient001/patient001_frame12.nii.gz: an image without a mask (id 'patient001_frame12')",
        "patient002/patient002_frame12_gt.nii.gz: a mask without an image (id 'patient002_frame12')",
        "patient003: got patient003_frame01, expected two phases",
        "patient004: got none, expected two phases",
        "patient005/patient005_frame01.nii.gz: has the same id 'patient005_frame01' as ",
        "patient006_frame01_gt.nii.gz: got labels 4, expected only 0, 1, 2, 3 (4 classes)",
        "patient007_frame01_gt.nii.gz: got spacing [10.0, 1.5, 1.5] mm, expected [10.0, 1.25, 1.5]",
        "patient008: got patient008_frame01, patient008_frame05, patient008_frame12, expected two phases",
        "patient008/patient008_frame05.nii.gz: holds the same image as ",
    ]
    assert_named_once(refusal("acdc", raw_copy, "released"), expected)


def test_every_bad_prepared_file_is_named(mt_unet):
    train = mt_unet / "train"
    image = np.random.default_rng(0).random((SIDE, SIDE))
    (train / "case_001_sliceED_4.npz").unlink()
    last = max(train.glob("case_004_sliceED_?.npz"))
    last.unlink()
    (mt_unet / "test" / "case_002_volume_ES.npz").unlink()
    write_arrays(train / "case_005_sliceED_0.npz", img=image, label=np.full((SIDE, SIDE), 4, np.uint8))
    write_arrays(train / "case_006_sliceED_0.npz", pixels=image, label=np.zeros((SIDE, SIDE), np.uint8))
    expected = [
        "patient002: got patient002_ED, expected two phases",
        "patient001_ED: no file of slices 4 (1 of 0 to ",
        f"{mt_unet}: got 1302 training slices, expected 1304 as the split 'mt_unet' has",
        "train/case_005_sliceED_0.npz (label): got labels 4, expected only 0, 1, 2, 3 (4 classes)",
        "train/case_006_sliceED_0.npz: no array 'image' or 'img' in the file, got ",
    ]
    assert_named_once(refusal("acdc", mt_unet, "mt_unet"), expected, first=True)


def test_prepared_files_of_one_split_under_another(mt_unet, tmp_path):
    """The patients decide, wherever their files lie."""
    cache = prepare(open_source("acdc", mt_unet, "released"), tmp_path / "out", SIDE)
    assert sizes(cache.splits) == CASES["released"]
    assert cache.case("patient002_ED").source == "test/case_002_volume_ED.npz", "trained on here"


def test_folders_that_hold_something_else(raw_copy, mt_unet, tmp_path):
    with pytest.raises(DataError, match="nowhere: no such folder"):
        open_source("acdc", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"looked for patient001_frame01\.nii\.gz and .* found nothing"):
        open_source("acdc", tmp_path / "empty")
    shutil.move(mt_unet, raw_copy / "prepared")
    with pytest.raises(DataError, match="holds raw and prepared files, expected one of the two"):
        open_source("acdc", raw_copy)
