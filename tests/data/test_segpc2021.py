"""SegPC-2021 in its folders, with the published number of pictures."""

import numpy as np
import pytest
from published_sets import SIDE, assert_named_once, refusal, segpc_mask, write_picture, write_segpc2021

from simmp_fast.data import DataError, Intensity, open_source, prepare, segpc2021


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Six and three pictures, and a split of as many."""
    monkeypatch.setattr(segpc2021, "COUNTS", {"train": 6, "validation": 3})
    monkeypatch.setattr(segpc2021, "VALIDATION", 2)
    write_segpc2021(tmp_path / "segpc", (6, 3))
    return tmp_path / "segpc"


def test_all_pictures(tmp_path):
    root = tmp_path / "segpc"
    write_segpc2021(root)
    cache = prepare(open_source("segpc2021", root), tmp_path / "out", SIDE)
    assert cache.classes == ["background", "cytoplasm", "nucleus"]
    assert cache.channels == 3
    assert cache.recipe.intensity == Intensity("range", 0, 255)
    assert {name: len(ids) for name, ids in cache.splits.items()} == {"train": 268, "validation": 30, "test": 200}
    assert all(i.startswith("train_") for name in ("train", "validation") for i in cache.splits[name])
    assert cache.splits["test"][0] == "validation_100"
    case = cache.case("train_106")
    assert case.source == "train/x/106.bmp"
    assert case.native_shape == (1, SIDE, SIDE + 2)


def test_cells_are_merged_and_nucleus_goes_before_cytoplasm(small):
    _, labels = open_source("segpc2021", small).cases[0].load()
    first, second = segpc_mask(1), segpc_mask(2)
    nucleus = (first == 40) | (second == 40)
    cytoplasm = ((first == 20) | (second == 20)) & ~nucleus
    assert labels.dtype == np.uint8
    assert np.array_equal(labels, np.where(nucleus, 2, cytoplasm))
    assert ((first == 40) & (second == 20)).any(), "so that the order matters"


def test_every_bad_file_is_named(small):
    train, validation = small / "train", small / "validation"
    for cell in (1, 2):
        (train / "y" / f"100_{cell}.bmp").unlink()
    (train / "x" / "101.bmp").unlink()
    write_picture(train / "y" / "102_1.bmp", segpc_mask(1) + 1)
    write_picture(train / "y" / "102_2.bmp", segpc_mask(1)[:4])
    write_picture(validation / "y" / "100_2.bmp", np.full((SIDE, SIDE + 2), 60, np.uint8))
    (validation / "x" / "102.bmp").write_bytes((train / "x" / "103.bmp").read_bytes())
    expected = [
        "train/x/100.bmp: an image without a mask (id '100')",
        "train/y/101_1.bmp: a mask without an image (id '101')",
        "train/y/101_2.bmp: a mask without an image (id '101')",
        "train/x: got 5 images, expected 6",
        "train/y/102_1.bmp: got labels 1, 21, 41, expected only 0, 20, 40 (3 classes)",
        "train/y/102_2.bmp: got shape [4, 10], expected [8, 10]",
        "validation/y/100_2.bmp: got labels 60, expected only 0, 20, 40 (3 classes)",
        "validation/x/102.bmp: holds the same image as train/x/103.bmp",
    ]
    assert_named_once(refusal("segpc2021", small), expected)


@pytest.mark.parametrize("part", ["train/x", "train/y", "validation/x", "validation/y"])
def test_folders_that_hold_something_else(small, part):
    with pytest.raises(DataError, match="nowhere: no such folder"):
        open_source("segpc2021", small / "nowhere")
    (small / part).rename(small / "other")
    with pytest.raises(DataError, match=r"looked for the folders train/x, .*; found other/, train/, validation/"):
        open_source("segpc2021", small)
