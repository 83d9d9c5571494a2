"""Fixtures of the evaluation tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from stand_ins import AFFINE, SIDE, LevelModel, make_cache

from simmp_fast.data.cache import Cache
from simmp_fast.data.preprocess import Geometry, Intensity, Recipe


@pytest.fixture
def model() -> LevelModel:
    return LevelModel()


@pytest.fixture
def recipe() -> Recipe:
    return Recipe("levels", ("background", "low", "high"), 1, SIDE, Intensity("window", 0, 200))


@pytest.fixture
def cache(tmp_path: Path, recipe: Recipe) -> Cache:
    """Two volumes and a picture at twice the network's resolution; the model errs on a twentieth of the pixels."""
    rng = np.random.default_rng(7)
    cases = {}
    for name, slices in (("first", 5), ("second", 3), ("picture", 1)):
        small = np.zeros((slices, SIDE, SIDE), np.uint8)
        small[:, 3:12, 4:13] = 1
        small[slices // 2 :, 6:10, 6:10] = 2
        native = small.repeat(2, axis=1).repeat(2, axis=2)
        noisy = np.where(rng.random(small.shape) < 0.05, (small + 1) % 3, small)
        images = (noisy / 2).astype(np.float32)[:, None]
        placed = Geometry((slices, 2 * SIDE, 2 * SIDE), spacing=(3.0, 0.5, 0.75), affine=AFFINE)
        cases[name] = (images, native, placed)
    return make_cache(tmp_path / "cache", recipe, cases)
