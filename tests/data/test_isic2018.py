"""ISIC-2018 in the folders of its archives, with the published number of pictures."""

import numpy as np
import pytest
from published_sets import SIDE, assert_named_once, refusal, write_isic2018, write_picture

from simmp_fast.data import DataError, Intensity, isic2018, open_source, prepare
from simmp_fast.data.formats import read_label


@pytest.fixture
def twelve(tmp_path, monkeypatch):
    """A set of twelve, and a split of as many."""
    monkeypatch.setattr(isic2018, "COUNTS", {"train": 8, "validation": 1, "test": 3})
    write_isic2018(tmp_path / "isic", 12)
    return tmp_path / "isic"


def test_all_pictures(tmp_path):
    root = tmp_path / "isic"
    write_isic2018(root)
    cache = prepare(open_source("isic2018", root), tmp_path / "out", SIDE)
    assert cache.classes == ["background", "lesion"]
    assert cache.channels == 3
    assert cache.images.dtype == np.uint8
    assert cache.recipe.intensity == Intensity("range", 0, 255)
    assert [len(ids) for ids in cache.splits.values()] == [1815, 259, 520]
    assert len({i for ids in cache.splits.values() for i in ids}) == 2594
    case = cache.case("ISIC_0000007")
    assert case.source == "ISIC2018_Task1-2_Training_Input/ISIC_0000007.jpg"
    assert case.native_shape == (1, SIDE, SIDE + 2)
    mask = root / "ISIC2018_Task1_Training_GroundTruth" / "ISIC_0000007_segmentation.png"
    assert np.array_equal(case.native_labels()[0], read_label(mask).array // 255)


def test_the_split_depends_on_the_ids_alone(twelve):
    splits = open_source("isic2018", twelve).splits()
    assert splits["validation"] == ["ISIC_0000005"]
    assert splits["test"] == ["ISIC_0000000", "ISIC_0000001", "ISIC_0000004"]
    assert splits["train"] == [f"ISIC_{i:07d}" for i in (2, 3, 6, 7, 8, 9, 10, 11)]


def test_every_bad_file_is_named(twelve):
    images, masks = twelve / isic2018.IMAGES, twelve / isic2018.MASKS
    (masks / "ISIC_0000000_segmentation.png").unlink()
    (images / "ISIC_0000001.jpg").unlink()
    write_picture(masks / "ISIC_0000002_segmentation.png", np.full((SIDE, SIDE + 2), 128, np.uint8))
    write_picture(masks / "ISIC_0000003_segmentation.png", np.zeros((SIDE, SIDE), np.uint8))
    (images / "ISIC_0000006.jpg").write_bytes(b"not a picture")
    expected = [
        "ISIC_0000000.jpg: an image without a mask (id 'ISIC_0000000')",
        "ISIC_0000001_segmentation.png: a mask without an image (id 'ISIC_0000001')",
        "Training_Input: got 11 images, expected 12: the split is of all",
        "ISIC_0000002_segmentation.png: got labels 128, expected only 0, 255 (2 classes)",
        "ISIC_0000003_segmentation.png: got shape [8, 8], expected [8, 10]",
        "ISIC_0000006.jpg: corrupt or truncated file",
    ]
    assert_named_once(refusal("isic2018", twelve), expected)


@pytest.mark.parametrize("part", [isic2018.IMAGES, isic2018.MASKS])
def test_folders_that_hold_something_else(twelve, part):
    with pytest.raises(DataError, match="nowhere: no such folder"):
        open_source("isic2018", twelve / "nowhere")
    with pytest.raises(DataError, match=r"looked for the folders ISIC2018_Task1-2_Training_Input and .* found ISIC_"):
        open_source("isic2018", twelve / isic2018.IMAGES)
    (twelve / part).rename(twelve / "other")
    with pytest.raises(DataError, match=r"looked for the folders .* found ISIC2018_.*/, other/"):
        open_source("isic2018", twelve)
