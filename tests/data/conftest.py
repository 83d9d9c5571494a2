"""Small data sets in the layouts that users have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from small_sets import write_picture, write_volume, write_yaml


@pytest.fixture
def volumes(tmp_path: Path) -> Path:
    """The YAML file of four NIfTI pairs of 9 x 8 x 5 voxels, ids a to d, labels 0 to 2."""
    rng = np.random.default_rng(0)
    root = tmp_path / "set"
    for name in "abcd":
        write_volume(root / "images" / f"{name}.nii.gz", rng.integers(-200, 300, (9, 8, 5)).astype(np.int16))
        write_volume(root / "masks" / f"{name}.nii.gz", rng.integers(0, 3, (9, 8, 5)).astype(np.uint8))
    intensity = {"rule": "window", "low": -125, "high": 275}
    return write_yaml(root / "set.yaml", name="set", classes=["background", "one", "two"], intensity=intensity)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """The YAML file of four colour JPEG images with 0/255 PNG masks of 12 x 10 pixels, ids p0 to p3."""
    rng = np.random.default_rng(1)
    root = tmp_path / "pictures"
    for i in range(4):
        write_picture(root / "in" / f"p{i}.jpg", rng.integers(0, 256, (12, 10, 3)).astype(np.uint8))
        write_picture(root / "truth" / f"p{i}_mask.png", (rng.integers(0, 2, (12, 10)) * 255).astype(np.uint8))
    keys = {"images": "in/*.jpg", "masks": "truth", "mask_suffix": "_mask", "mask_values": {0: 0, 255: 1}}
    return write_yaml(root / "set.yaml", name="skin", classes=["background", "lesion"], channels=3, **keys)


@pytest.fixture
def names() -> Callable[[Path], list[str]]:
    """Every name in a folder, hidden ones too: to see that nothing is left behind."""
    return lambda folder: sorted(p.name for p in folder.iterdir())
