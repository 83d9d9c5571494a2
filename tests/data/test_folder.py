import itertools

import h5py
import numpy as np
import pytest
import yaml
from small_sets import AFFINE, write_picture, write_volume, write_yaml

from simmp_fast.config import ConfigError
from simmp_fast.data.errors import DataError
from simmp_fast.data.folder import FolderSource
from simmp_fast.data.formats import read_image
from simmp_fast.data.preprocess import Intensity

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (6, 7)).astype(np.uint8)
MASK = (GREY > 99).astype(np.uint8)


def changed(path, **keys):
    return write_yaml(path, **(yaml.safe_load(path.read_text()) | keys))


def test_volumes_are_paired_by_name(volumes):
    source = FolderSource(volumes)
    assert [case.id for case in source.cases] == ["a", "b", "c", "d"]
    assert source.problems == []
    assert source.cases[1].source == "images/b.nii.gz"
    image, label = source.cases[1].load()
    assert image.array.shape == label.shape == (9, 8, 5)
    assert label.dtype == np.uint8
    assert source.recipe(64).intensity == Intensity("window", -125, 275)
    assert sorted(itertools.chain(*source.splits().values())) == ["a", "b", "c", "d"]


def test_pictures_with_suffix_and_mask_values(pictures):
    source = FolderSource(pictures)
    image, label = source.cases[2].load()
    assert source.cases[2].id == "p2"
    assert image.colour
    assert set(np.unique(label)) == {0, 1}
    assert source.recipe(64).intensity == Intensity("range", 0, 255)


@pytest.mark.parametrize(("image_suffix", "mask_suffix"), [("", "_mask"), ("_img", "")])
def test_images_and_masks_in_one_folder(tmp_path, image_suffix, mask_suffix):
    for name in ("a", "b"):
        write_picture(tmp_path / f"{name}{image_suffix}.png", GREY)
        write_picture(tmp_path / f"{name}{mask_suffix}.bmp", MASK)
    (tmp_path / "notes.txt").write_text("not an image")
    keys = {"images": ".", "masks": ".", "image_suffix": image_suffix, "mask_suffix": mask_suffix}
    source = FolderSource(write_yaml(tmp_path / "s.yaml", name="s", classes=["no", "yes"], **keys))
    assert [case.id for case in source.cases] == ["a", "b"]
    assert source.problems == []
    assert np.array_equal(source.cases[0].load()[1], MASK)


def test_npz_and_h5_hold_both(tmp_path):
    (tmp_path / "images").mkdir()
    np.savez(tmp_path / "images" / "a.npz", image=GREY, label=MASK)
    with h5py.File(tmp_path / "images" / "b.npy.h5", "w") as file:
        file["image"], file["label"] = np.stack([GREY] * 3), np.stack([MASK] * 3)
    source = FolderSource(write_yaml(tmp_path / "s.yaml", name="s", classes=["no", "yes"], masks=None))
    assert [case.load()[1].shape for case in source.cases] == [(6, 7), (3, 6, 7)]
    write_picture(tmp_path / "images" / "c.png", GREY)
    assert "c.png: masks is null" in FolderSource(tmp_path / "s.yaml").problems[0]


def test_pairs_that_do_not_match_are_all_named(volumes):
    root = volumes.parent
    (root / "masks" / "a.nii.gz").unlink()
    (root / "images" / "c.nii.gz").unlink()
    write_volume(root / "images" / "d.nii", np.zeros((2, 2, 2), np.int16))
    problems = "\n".join(FolderSource(volumes).problems)
    assert "images/a.nii.gz: an image without a mask (id 'a')" in problems
    assert "masks/c.nii.gz: a mask without an image (id 'c')" in problems
    assert "d.nii.gz: has the same id 'd' as" in problems


def test_empty_and_missing_folders(tmp_path):
    path = write_yaml(tmp_path / "s.yaml", name="s", classes=["no", "yes"])
    with pytest.raises(DataError, match="images: no such folder"):
        FolderSource(path)
    (tmp_path / "images").mkdir()
    with pytest.raises(DataError, match=r"images: no images, expected files of kind \.nii"):
        FolderSource(path)
    with pytest.raises(DataError, match=r"no images.*_x"):
        FolderSource(changed(path, images="*.png", image_suffix="_x"))


def load_all(path):
    for case in FolderSource(path).cases:
        case.load()


def test_a_mask_of_another_shape(volumes):
    write_volume(volumes.parent / "masks" / "b.nii.gz", np.zeros((9, 8, 4), np.uint8))
    with pytest.raises(DataError, match=r"masks/b\.nii\.gz: got shape \[9, 8, 4\], expected \[9, 8, 5\]"):
        load_all(volumes)


@pytest.mark.parametrize(
    ("affine", "message"), [(AFFINE @ np.diag([-1, 1, 1, 1]), "other directions"), (AFFINE * 2, "got spacing")]
)
def test_a_mask_in_another_space(volumes, affine, message):
    write_volume(volumes.parent / "masks" / "b.nii.gz", np.zeros((9, 8, 5), np.uint8), affine)
    with pytest.raises(DataError, match=rf"masks/b\.nii\.gz: .*{message}"):
        load_all(volumes)


def test_labels_that_stand_for_no_class(volumes, pictures):
    write_volume(volumes.parent / "masks" / "b.nii.gz", np.arange(360, dtype=np.int16).reshape(9, 8, 5) % 5)
    with pytest.raises(DataError, match=r"b\.nii\.gz: got labels 3, 4, expected only 0, 1, 2 .*mask_values"):
        load_all(volumes)
    write_picture(pictures.parent / "truth" / "p1_mask.png", np.full((12, 10), 254, np.uint8))
    with pytest.raises(DataError, match=r"p1_mask\.png: got labels 254, expected only 0, 255"):
        load_all(pictures)


def test_explicit_ids_that_do_not_exist(volumes):
    source = FolderSource(changed(volumes, split_ids={"train": ["a"], "test": ["z"]}))
    with pytest.raises(ConfigError, match=r"split_ids\.test: no such cases: z"):
        source.splits()


def test_images_are_read_as_they_are(volumes):
    source = FolderSource(volumes)
    image, _ = source.cases[0].load()
    assert np.array_equal(image.array, read_image(volumes.parent / "images" / "a.nii.gz").array)
