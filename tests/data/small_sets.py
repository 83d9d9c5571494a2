"""Writers of the small files that the tests of the data read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

AFFINE = np.array([[2.0, 0, 0, -10], [0, 1.5, 0, 20], [0, 0, 3, 5], [0, 0, 0, 1]])


def write_volume(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> None:
    nibabel = pytest.importorskip("nibabel", reason="NIfTI files need nibabel")
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, affine), path)


def write_picture(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def write_yaml(path: Path, **keys: object) -> Path:
    path.write_text(yaml.safe_dump(keys), encoding="utf-8")
    return path
