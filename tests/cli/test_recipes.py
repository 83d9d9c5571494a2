"""Which recipe of data goes with weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from simmp_fast.cli.common import class_names, load_recipe
from simmp_fast.config import ConfigError, to_mapping
from simmp_fast.data.errors import DataError
from simmp_fast.data.preprocess import Intensity, Recipe
from simmp_fast.messages import Note
from simmp_fast.model.sealing import seal

RECIPE = Recipe("shapes", ("background", "disc"), 1, 64, Intensity("range", 0, 255))


def other(**changes: Any) -> str:
    return json.dumps({**to_mapping(RECIPE), **changes})


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    header = {"classes": json.dumps(RECIPE.classes), "recipe": json.dumps(to_mapping(RECIPE))}
    tensors = {"a": torch.ones(3)}
    save_file(tensors, tmp_path / "best.safetensors", seal(tensors, header))
    return tmp_path / "best.safetensors"


def test_weights_know_their_recipe(weights: Path) -> None:
    assert load_recipe(weights, None) == RECIPE
    (weights.parent / "data.json").write_text(other())
    assert load_recipe(weights, None) == RECIPE
    assert class_names(weights) == ["background", "disc"]


def test_a_recipe_of_another_run_is_refused(weights: Path) -> None:
    path = weights.parent / "data.json"
    path.write_text(other(name="others", slice_axis="coronal"))
    message = (
        r"data.json: differs from what best.safetensors was trained on: name is 'others', saved as 'shapes'; slice_axis"
    )
    with pytest.raises(ConfigError, match=message):
        load_recipe(weights, None)
    with pytest.warns(Note, match=r"data.json: differs from what .*best.safetensors was trained on: name is 'others'"):
        assert load_recipe(weights, path).slice_axis == "coronal"


def test_weights_without_a_recipe(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "old.safetensors")
    with pytest.raises(ConfigError, match=r"data.json: no such file; name with --recipe"):
        load_recipe(tmp_path / "old.safetensors", None)
    (tmp_path / "data.json").write_text(other())
    assert load_recipe(tmp_path / "old.safetensors", None) == RECIPE
    assert class_names(tmp_path / "old.safetensors") is None


def test_damaged_weights_are_named(weights: Path) -> None:
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + b"\0")
    for read in (class_names, lambda path: load_recipe(path, None)):
        with pytest.raises(DataError, match=r"best.safetensors: damaged"):
            read(weights)
