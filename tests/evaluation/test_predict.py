"""New files: label maps that lie where their images lie, pictures, folders, and errors."""

from __future__ import annotations

import gzip
import itertools
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from stand_ins import SIDE, LevelModel

from simmp_fast.data.errors import DataError
from simmp_fast.data.preprocess import Intensity, Recipe
from simmp_fast.evaluation.predict import predict
from simmp_fast.files import new_file

nibabel = pytest.importorskip("nibabel")

OBLIQUE = np.array([[0.9, -0.2, 0.1], [0.25, 0.8, -0.15], [-0.05, 0.2, 1.1]])


def levels(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Values near 0, 100 and 200, so that the stand-in model gives classes 0, 1 and 2."""
    rng = np.random.default_rng(seed)
    return (100 * rng.integers(0, 3, shape) + rng.integers(-20, 21, shape)).astype(np.int16)


def classes_of(array: np.ndarray) -> np.ndarray:
    return np.rint(array / 100).astype(np.uint8)


def save_nifti(path: Path, array: np.ndarray, affine: np.ndarray, sform: int = 2, qform: int = 1) -> Path:
    image = nibabel.Nifti1Image(array, affine)
    image.set_sform(affine, sform)
    image.set_qform(affine, qform)
    nibabel.save(image, path)
    return path


def affine_of(order: tuple[int, ...], signs: tuple[int, ...]) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = OBLIQUE[:, order] * np.array(signs) * np.array([0.8, 1.5, 3.0])
    affine[:3, 3] = (-11, 22, 33)
    return affine


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, 1, -1), (-1, -1, 1)])
def test_nifti_round_trip(
    model: LevelModel, recipe: Recipe, tmp_path: Path, order: tuple[int, ...], signs: tuple[int, ...]
) -> None:
    """Whatever the order and direction of its axes, a volume's label map matches it voxel by voxel."""
    array, affine = levels((SIDE,) * 3), affine_of(order, signs)
    source = save_nifti(tmp_path / "image.nii.gz", array, affine)
    assert predict(model, recipe, source, tmp_path / "out.nii.gz") == [tmp_path / "out.nii.gz"]
    before, after = nibabel.load(source), nibabel.load(tmp_path / "out.nii.gz")
    np.testing.assert_array_equal(np.asarray(after.dataobj), classes_of(array))
    np.testing.assert_array_equal(after.affine, before.affine)
    assert after.get_data_dtype() == np.uint8
    assert np.asarray(after.dataobj).dtype == np.uint8  # no scaling turns it into floats
    for field in ("pixdim", "qform_code", "sform_code", "quatern_b", "qoffset_x", "srow_x", "srow_z", "xyzt_units"):
        np.testing.assert_array_equal(after.header[field], before.header[field], err_msg=field)


@pytest.mark.parametrize("axis", ["axial", "coronal", "sagittal"])
@pytest.mark.parametrize("codes", [(0, 1), (1, 0), (4, 4)])
def test_form_codes_and_slice_axes(
    model: LevelModel, recipe: Recipe, tmp_path: Path, axis: str, codes: tuple[int, int]
) -> None:
    array = levels((SIDE,) * 3)
    source = save_nifti(tmp_path / "image.nii", array, np.diag([2.0, -1.0, 3.0, 1.0]), *codes)
    predict(model, replace(recipe, slice_axis=axis), source, tmp_path / "out.nii")
    header, original = (nibabel.load(tmp_path / name).header for name in ("out.nii", "image.nii"))
    assert (int(header["sform_code"]), int(header["qform_code"])) == codes
    np.testing.assert_array_equal(header.get_best_affine(), original.get_best_affine())
    np.testing.assert_array_equal(np.asarray(nibabel.load(tmp_path / "out.nii").dataobj), classes_of(array))


def test_scaled_values_and_other_sizes(model: LevelModel, recipe: Recipe, tmp_path: Path) -> None:
    """Stored integers with a slope, slices that must be resized, NIfTI-2: shape and header right, labels nearly all."""
    stored = np.repeat(np.repeat(levels((4, 6, 9)), 12, axis=0), 10, axis=1)
    image = nibabel.Nifti2Image(stored // 10, np.diag([1.0, 1.0, 5.0, 1.0]))
    image.header.set_slope_inter(10, 3)
    image.header["cal_max"] = 200
    nibabel.save(image, tmp_path / "image.nii.gz")
    predict(model, recipe, tmp_path / "image.nii.gz", tmp_path / "labels")
    after = nibabel.load(tmp_path / "labels" / "image.nii.gz")
    assert isinstance(after, nibabel.Nifti2Image)
    assert after.shape == stored.shape
    found = np.asarray(after.dataobj)
    assert found.dtype == np.uint8
    assert (found == classes_of(stored)).mean() > 0.7
    assert float(after.header["cal_max"]) == 0
    with gzip.open(tmp_path / "labels" / "image.nii.gz") as file:
        raw = nibabel.Nifti2Header.from_fileobj(file)
    assert (float(raw["scl_slope"]), float(raw["scl_inter"])) == (1, 0)


def test_flat_volume(model: LevelModel, recipe: Recipe, tmp_path: Path) -> None:
    """A volume with a last axis of one keeps it."""
    array = levels((SIDE, SIDE, 1, 1))
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), tmp_path / "image.nii")
    predict(model, recipe, tmp_path / "image.nii", tmp_path / "out.nii")
    np.testing.assert_array_equal(np.asarray(nibabel.load(tmp_path / "out.nii").dataobj), classes_of(array))


def test_probabilities_and_overlay_of_a_volume(model: LevelModel, recipe: Recipe, tmp_path: Path) -> None:
    array, affine = levels((SIDE, SIDE, SIDE)), affine_of((2, 0, 1), (1, -1, 1))
    source = save_nifti(tmp_path / "image.nii.gz", array, affine)
    written = predict(model, recipe, source, tmp_path / "out", probabilities=True, overlays=True)
    names = ["image.nii.gz", "image_probabilities.nii.gz", "image_overlay.png"]
    assert written == [tmp_path / "out" / name for name in names]
    after = nibabel.load(written[1])
    likely = np.asarray(after.dataobj)
    assert likely.shape == (SIDE, SIDE, SIDE, 3)
    assert likely.dtype == np.float32
    np.testing.assert_array_equal(after.affine, nibabel.load(source).affine)
    np.testing.assert_allclose(likely.sum(-1), 1, rtol=1e-5)
    np.testing.assert_array_equal(likely.argmax(-1), np.asarray(nibabel.load(written[0]).dataobj))
    np.testing.assert_array_equal(likely.argmax(-1), classes_of(array))
    assert Image.open(written[2]).size[0] > 300


@pytest.mark.parametrize("ending", ["png", "bmp", "tif", "tiff"])
def test_pictures(model: LevelModel, recipe: Recipe, tmp_path: Path, ending: str) -> None:
    array = np.clip(levels((SIDE, SIDE)), 0, 255).astype(np.uint8)
    source = tmp_path / f"image.{ending}"
    Image.fromarray(array).save(source)
    written = predict(model, recipe, source, tmp_path / "out.png", probabilities=True, overlays=True)
    labels = Image.open(written[0])
    assert labels.mode == "L"
    np.testing.assert_array_equal(np.asarray(labels), classes_of(array))
    likely = np.load(written[1])
    assert likely.shape == (SIDE, SIDE, 3)
    assert written[1].name == "out_probabilities.npy"
    assert Image.open(written[2]).size[0] > 300


def test_colour_picture_and_wrong_channels(model: LevelModel, recipe: Recipe, tmp_path: Path) -> None:
    array = np.zeros((20, 30, 3), np.uint8)
    array[:, 10:] = (255, 100, 0)
    Image.fromarray(array).save(tmp_path / "colour.png")
    colour = replace(recipe, channels=3, intensity=Intensity("range", 0, 255))
    predict(model, colour, tmp_path / "colour.png", tmp_path / "out.png", overlays=True)
    assert np.asarray(Image.open(tmp_path / "out.png")).shape == (20, 30)
    with pytest.raises(DataError, match=r"colour\.png: got a colour picture, expected one channel"):
        predict(model, recipe, tmp_path / "colour.png", tmp_path / "other.png")
    assert not (tmp_path / "other.png").exists()


def test_four_dimensions(model: LevelModel, recipe: Recipe, tmp_path: Path) -> None:
    nibabel.save(nibabel.Nifti1Image(levels((4, 4, 4, 2)), np.eye(4)), tmp_path / "film.nii.gz")
    with pytest.raises(DataError, match=r"film\.nii\.gz: .*\[4, 4, 4, 2\], expected three axes"):
        predict(model, recipe, tmp_path / "film.nii.gz", tmp_path / "out.nii.gz")


def test_nothing_is_overwritten_unless_asked(model: LevelModel, recipe: Recipe, tmp_path: Path) -> None:
    source = save_nifti(tmp_path / "image.nii.gz", levels((SIDE,) * 3), np.eye(4))
    target = tmp_path / "out.nii.gz"
    target.write_bytes(b"precious")
    with pytest.raises(DataError, match=r"out\.nii\.gz: already there; overwrite replaces it"):
        predict(model, recipe, source, target)
    assert target.read_bytes() == b"precious"
    predict(model, recipe, source, target, overwrite=True)
    first = target.read_bytes()
    predict(model, recipe, source, target, overwrite=True)
    assert target.read_bytes() == first
    with pytest.raises(DataError, match="is also the output"):
        predict(model, recipe, source, source, overwrite=True)
    with pytest.raises(DataError, match="is the folder of the images"):
        predict(model, recipe, tmp_path, tmp_path, overwrite=True)


def test_folder_with_bad_files(model: LevelModel, recipe: Recipe, tmp_path: Path) -> None:
    """The good files are done, the bad ones are named at the end, nothing half-written is left."""
    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    array = levels((SIDE,) * 3)
    save_nifti(images / "a.nii.gz", array, np.eye(4))
    whole = (images / "a.nii.gz").read_bytes()
    (images / "b.nii.gz").write_bytes(whole[: len(whole) // 2])
    (images / "c.png").write_bytes(b"no picture")
    Image.fromarray(np.clip(array[0], 0, 255).astype(np.uint8)).save(images / "d.png")
    (images / "notes.txt").write_text("not an image")
    model.train()
    with pytest.raises(DataError, match="2 of 4 files done") as error:
        predict(model, recipe, images, out)
    assert "b.nii.gz" in str(error.value)
    assert "c.png" in str(error.value)
    assert "a.nii.gz" not in str(error.value)
    assert sorted(p.name for p in out.iterdir()) == ["a.nii.gz", "d.png"]
    np.testing.assert_array_equal(np.asarray(nibabel.load(out / "a.nii.gz").dataobj), classes_of(array))
    assert model.training


def test_an_output_name_that_is_too_long_costs_that_file_alone(
    model: LevelModel, recipe: Recipe, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a", "b" * 251):
        Image.fromarray(levels((SIDE, SIDE)).clip(0, 255).astype(np.uint8)).save(tmp_path / "in" / f"{name}.png")
    with pytest.raises(DataError, match="1 of 2 files done(.|\n)*too long"):
        predict(model, recipe, tmp_path / "in", tmp_path / "out", overlays=True)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.png", "a_overlay.png"]


def test_refusals(model: LevelModel, recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        predict(model, recipe, tmp_path / "absent.nii.gz", tmp_path / "out")
    (tmp_path / "table.csv").write_text("1,2")
    with pytest.raises(DataError, match=r"table\.csv: unknown kind of file"):
        predict(model, recipe, tmp_path / "table.csv", tmp_path / "out")
    Image.fromarray(levels((4, 4)).astype(np.uint8)).save(tmp_path / "image.png")
    with pytest.raises(DataError, match=r"out\.nii\.gz: got an output of kind '\.gz', expected \.png"):
        predict(model, recipe, tmp_path / "image.png", tmp_path / "out.nii.gz")
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(DataError, match="no image in this folder"):
        predict(model, recipe, folder, tmp_path / "out")
    for name in ("x.png", "x.bmp"):
        Image.fromarray(levels((4, 4)).astype(np.uint8)).save(folder / name)
    with pytest.raises(DataError, match=r"x\.bmp and x\.png: both would become x\.png"):
        predict(model, recipe, folder, tmp_path / "out")
    (folder / "x.bmp").rename(folder / "x_overlay.png")
    with pytest.raises(DataError, match=r"x\.png and x_overlay\.png: both would become x_overlay\.png"):
        predict(model, recipe, folder, tmp_path / "out", overlays=True)
    assert not (tmp_path / "out").exists()


class Greedy(LevelModel):
    """Finds no memory for images in which class 2 is most of all."""

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        if image.mean() > 0.8:
            raise RuntimeError("err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
        return super().forward(image)


def test_short_memory(recipe: Recipe, tmp_path: Path) -> None:
    """A folder goes on and names the file; a single file is an error that names it."""
    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    array = levels((SIDE, SIDE))
    for name, plus in (("a", 0), ("b", 180), ("c", 0)):
        Image.fromarray(np.clip(array + plus, 0, 200).astype(np.uint8)).save(images / f"{name}.png")
    message = r"b\.png: not enough memory \(err == 0. DefaultCPUAllocator: can't allocate"
    with pytest.raises(DataError, match="2 of 3 files done") as error:
        predict(Greedy(), recipe, images, out)
    assert re.search(message, str(error.value))
    assert sorted(path.name for path in out.iterdir()) == ["a.png", "c.png"]
    with pytest.raises(MemoryError, match=message):
        predict(Greedy(), recipe, images / "b.png", tmp_path / "b.png")


def test_errors_of_the_model_are_not_hidden(model: LevelModel, recipe: Recipe, tmp_path: Path) -> None:
    Image.fromarray(np.clip(levels((SIDE, SIDE)), 0, 255).astype(np.uint8)).save(tmp_path / "a.png")
    model.norm = torch.nn.BatchNorm2d(2)
    with pytest.raises(RuntimeError, match="running_mean"):
        predict(model, recipe, tmp_path, tmp_path / "out")


@pytest.mark.parametrize("target", ["file/out.png", "file", "file/deep/out.png"])
def test_a_file_in_place_of_the_output_folder(
    model: LevelModel, recipe: Recipe, tmp_path: Path, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    Image.fromarray(np.clip(levels((SIDE, SIDE)), 0, 255).astype(np.uint8)).save(tmp_path / "a.png")
    monkeypatch.setattr(model, "forward", None)  # nothing is computed
    with pytest.raises(DataError, match=f"{tmp_path}/file: got a file, expected a folder"):
        predict(model, recipe, tmp_path / "a.png", tmp_path / target)


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ("x" * 300, "out.png", "x: cannot be read .File name too long"),
        ("a.png", "x" * 300, "x: cannot be written .File name too long"),
        ("a.png", "x" * 300 + ".png", r"x\.png: cannot be written .File name too long"),
        ("a.png", "x" * 300 + "/deep/out.png", r"out\.png: cannot be written .File name too long"),
        ("images", "/".join(["y" * 200] * 21), "y: cannot be written .File name too long"),
        ("a\0b.png", "out.png", r"a\\0b\.png: got a name with a NUL character"),
        ("a.png", "a\0b.png", r"a\\0b\.png: got a name with a NUL character"),
        ("images", "a\0b", r"a\\0b: got a name with a NUL character"),
        ("nowhere", "out.png", "nowhere: no such file or folder"),
        ("loop", "out.png", "loop: "),
        ("a.png", "nowhere", "nowhere: got a link that leads nowhere"),
        ("images", "nowhere", "nowhere: got a link that leads nowhere"),
        ("a.png", "nowhere.png", r"nowhere\.png: already there"),
        ("a.png", "loop/out.png", "loop"),
        ("a.png", "loop.png", r"loop\.png: "),
    ],
)
def test_paths_that_cannot_be(
    model: LevelModel, recipe: Recipe, tmp_path: Path, source: str, target: str, message: str
) -> None:
    (tmp_path / "images").mkdir()
    for name in ("a.png", "images/b.png"):
        Image.fromarray(np.clip(levels((SIDE, SIDE)), 0, 255).astype(np.uint8)).save(tmp_path / name)
    for name, to in (("nowhere", "no"), ("nowhere.png", "no"), ("loop", "loop"), ("loop.png", "loop.png")):
        (tmp_path / name).symlink_to(tmp_path / to)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(DataError, match=message):
        predict(model, recipe, tmp_path / source, tmp_path / target)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_names_as_long_as_the_system_allows(model: LevelModel, recipe: Recipe, tmp_path: Path) -> None:
    """And one byte more, which an output's own ending makes, is refused before anything is computed."""
    image = Image.fromarray(np.clip(levels((SIDE, SIDE)), 0, 255).astype(np.uint8))
    for name in ("x" * 251 + ".png", "\u00e9" * 125 + ".png"):
        image.save(tmp_path / name)
        assert [path.name for path in predict(model, recipe, tmp_path / name, tmp_path / "out")] == [name]
        with pytest.raises(DataError, match=r"_overlay\.png: cannot be written .File name too long"):
            predict(model, recipe, tmp_path / name, tmp_path / "more", overlays=True)
    assert not (tmp_path / "more").exists()


def test_leftovers_of_killed_predictions_are_removed(model: LevelModel, recipe: Recipe, tmp_path: Path) -> None:
    Image.fromarray(np.clip(levels((SIDE, SIDE)), 0, 255).astype(np.uint8)).save(tmp_path / "a.png")
    with new_file(tmp_path / "out.png") as mine:
        mine.touch()
    left = tmp_path / re.sub("[0-9a-f]{12}-out", "0123456789ab-out", mine.name)
    left.touch()  # by another process of this number, which ended
    predict(model, recipe, tmp_path / "a.png", tmp_path / "out.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([mine.name, "a.png", "out.png"])
