"""Reads the golden arrays and rebuilds the weights that their recipe defines."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import golden_recipe
import numpy as np
import torch
from torch import Tensor

FOLDER = Path(__file__).parent / "golden"


def golden(name: str) -> dict[str, Tensor]:
    """All arrays of ``golden/<name>.npz`` as tensors."""
    with np.load(FOLDER / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(np.array(arrays[key])) for key in arrays.files}


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over the largest absolute expected value."""
    got, expected = got.detach().double(), expected.double()
    return float((got - expected).abs().max() / expected.abs().max())


def _source_name(name: str) -> str:
    """The name whose recipe a tensor follows: encoder A's stages are stored a second time under aliases."""
    if name.startswith("stem_1."):
        return f"backbone1.stem.{name.removeprefix('stem_1.')}"
    if name.startswith("encoder1_"):
        stage, rest = name.removeprefix("encoder1_").split(".", 1)
        return f"backbone1.stages.{int(stage) - 1}.{rest}"
    return name


@cache
def released_state_dict() -> dict[str, Tensor]:
    """A released checkpoint's 1,317 tensors, with the golden weights."""
    shapes = json.loads((FOLDER / "released_state_dict.json").read_text())
    state = {}
    for name, (shape, dtype) in shapes.items():
        leaf = name.rsplit(".", 1)[-1]
        if dtype == "int64":
            state[name] = torch.zeros(shape, dtype=torch.int64)
        elif leaf in ("k", "warmup_iter_counter", "pool_structured"):
            value = {"k": 50.0, "warmup_iter_counter": 2001.0, "pool_structured": 0.0}[leaf]
            state[name] = torch.full(shape, value)
        else:
            state[name] = torch.from_numpy(golden_recipe.tensor(_source_name(name), tuple(shape)))
    return state
