"""NaN and infinities are named and refused, in weights, in outputs and in caches; never scored."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from stand_ins import SIDE, LevelModel, make_cache

from simmp_fast.data.cache import Cache
from simmp_fast.data.errors import DataError
from simmp_fast.data.preprocess import Geometry, Recipe
from simmp_fast.evaluation.evaluate import case_dice, evaluate
from simmp_fast.evaluation.inference import NotFiniteError, class_probabilities, segment
from simmp_fast.evaluation.predict import predict


class Fragile(LevelModel):
    """One head gives `value` in one pixel for images in which class 2 is most of all."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        heads = super().forward(image)
        heads[1][image.flatten(1).mean(1) > 0.8, 2, 3, 4] = self.value
        return heads


VALUES = [float("nan"), float("inf"), float("-inf")]


@pytest.fixture
def bright(tmp_path: Path, recipe: Recipe) -> Cache:
    """Three cases of two slices; the second slice of the second is bright."""
    truth = np.zeros((2, SIDE, SIDE), np.uint8)
    dark = np.zeros((2, 1, SIDE, SIDE), np.float32)
    second = dark.copy()
    second[1] = 1
    placed = Geometry(truth.shape)
    cases = {"a": (dark, truth, placed), "b": (second, truth, placed), "c": (dark, truth, placed)}
    return make_cache(tmp_path / "bright", recipe, cases)


@pytest.mark.parametrize("batch_size", [1, 3, 20])
@pytest.mark.parametrize("value", VALUES)
def test_outputs_are_named_by_case_and_slice(bright: Cache, value: float, batch_size: int) -> None:
    for function in (evaluate, case_dice):
        with pytest.raises(DataError, match=r"case b, slice 1 \(b\.nii\.gz\): the network's output is not finite"):
            function(Fragile(value), bright, "test", batch_size=batch_size)


@pytest.mark.parametrize("mirror", [False, True])
def test_streams_say_which_slice(mirror: bool) -> None:
    slices = np.zeros((5, 1, SIDE, SIDE), np.float32)
    slices[3] = 1
    model = Fragile(float("nan")).eval()
    with pytest.raises(NotFiniteError, match="slice 3 is not finite") as caught:
        list(segment(model, slices, 3, batch_size=2, mirror=mirror))
    assert caught.value.index == 3
    with pytest.raises(NotFiniteError, match="slice 3 is not finite"):
        class_probabilities(model, torch.from_numpy(slices), mirror=mirror)


@pytest.mark.parametrize("probabilities", [False, True])
def test_a_folder_goes_on_and_names_the_file(recipe: Recipe, tmp_path: Path, probabilities: bool) -> None:
    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    for name, low in (("a", 0), ("b", 190), ("c", 0)):
        array = np.linspace(low, 200, SIDE * SIDE).reshape(SIDE, SIDE)
        Image.fromarray(array.astype(np.uint8)).save(images / f"{name}.png")
    model = Fragile(float("nan"))
    with pytest.raises(DataError, match=r"2 of 3 files done(.|\n)*b\.png: slice 0: the network's output is not finite"):
        predict(model, recipe, images, out, probabilities=probabilities)
    assert {name[0] for name in os.listdir(out)} == {"a", "c"}
    with pytest.raises(DataError, match=r"images/b\.png: slice 0: the network's output is not finite"):
        predict(model, recipe, images / "b.png", tmp_path / "b.png")
    assert not (tmp_path / "b.png").exists()


@pytest.mark.parametrize("value", VALUES)
def test_weights_are_looked_at_first(bright: Cache, recipe: Recipe, tmp_path: Path, value: float) -> None:
    for name in ("levels", "norm.running_var"):
        model = LevelModel()
        state = model.state_dict()  # shares its tensors
        state[name][-1] = value
        for function in (evaluate, case_dice):
            with pytest.raises(DataError, match=f"model: {name} is not finite, expected weights that are numbers"):
                function(model, bright, "test")
        with pytest.raises(DataError, match=f"model: {name} is not finite"):
            predict(model, recipe, tmp_path / "no.png", tmp_path / "out")


def test_labels_that_are_no_class(bright: Cache) -> None:
    labels = np.load(bright.folder / "labels.npy", mmap_mode="r+")
    labels[3, 0, 0] = 200
    labels.flush()
    with pytest.raises(DataError, match=r"labels\.npy: .*case b: got labels 200, expected 0 to 2"):
        case_dice(LevelModel(), bright, "test")
