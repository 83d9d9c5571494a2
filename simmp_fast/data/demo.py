"""The demonstration: a real brain MRI that comes with nilearn, so that everything runs without a download.

It is the ICBM 2009a nonlinear symmetric T1 template (197 x 233 x 189 voxels of 1 mm, brain only) with its grey and
white matter probabilities. The template is *one* averaged head, so that training and held-out slices are slabs of the
same brain, with a few slices left out between them: it shows that the program works and says nothing about accuracy.

The labels: background is what lies outside the brain, where T1 is 0; inside, the class with the largest probability of
grey matter, white matter and the rest ("other": cerebrospinal fluid, mostly the ventricles and sulci).
"""

from __future__ import annotations

import importlib.util
from functools import cache, partial
from pathlib import Path

import numpy as np
from PIL import Image

from simmp_fast.data.cache import Cache
from simmp_fast.data.errors import DataError, disk_errors
from simmp_fast.data.formats import Array, Volume, read_image, write_nifti
from simmp_fast.data.preprocess import Intensity, Recipe
from simmp_fast.data.sources import SourceCase
from simmp_fast.files import atomic_file

CLASSES = ("background", "other", "grey matter", "white matter")

# Slabs of axial slices, first and one past the last: five slices apart, so that no held-out slice is a neighbour of a
# training slice. Held out are slabs in the middle, which all classes cross.
SLABS = {
    "train-low": (18, 48),
    "validation": (53, 63),
    "train-middle": (68, 84),
    "test": (89, 105),
    "train-high": (110, 146),
}
SPLITS = {"train": ["train-low", "train-middle", "train-high"], "validation": ["validation"], "test": ["test"]}


class DemoSource:
    """The template's axial slices as five cases."""

    name = "demo"
    problems: tuple[str, ...] = ()

    def __init__(self) -> None:
        template = _file("t1").name
        self.cases = [
            SourceCase(case_id, f"{template} (slices {first} to {stop - 1})", partial(_slab, case_id))
            for case_id, (first, stop) in SLABS.items()
        ]

    def recipe(self, image_size: int) -> Recipe:
        """8-bit grey values become 0..1."""
        return Recipe(self.name, CLASSES, 1, image_size, Intensity("range", 0, 255), "axial")

    def splits(self) -> dict[str, list[str]]:
        """ "train", "validation" and "test" to slabs."""
        return {name: list(ids) for name, ids in SPLITS.items()}


def demo_volume(path: str | Path, case_id: str = "test") -> None:
    """Write the T1 values of one slab (by default the held-out test slab) as a NIfTI file, with its place in space.

    Raises:
        DataError: nilearn is missing, or the file cannot be written.
    """
    image, _ = _slab(case_id)
    assert image.affine is not None
    write_nifti(path, image.array, image.affine)


def demo_slice(path: str | Path, cache: Cache) -> None:
    """Write the middle slice of the held-out test slab as an 8-bit PNG picture, at the cache's own size.

    Unlike `demo_volume` it needs the cache alone, neither nilearn nor nibabel.

    Raises:
        DataError: the cache holds no test slab, or the file cannot be written.
    """
    case = cache.case(SPLITS["test"][0])
    picture = Image.fromarray(np.rint(case.image(case.slices // 2)[0] * 255).astype(np.uint8))
    with disk_errors(path), atomic_file(path) as temporary:
        picture.save(temporary, format="PNG")


def _file(tissue: str) -> Path:
    # Found without importing nilearn, which takes seconds.
    package = importlib.util.find_spec("nilearn")
    if package is None or package.origin is None:
        raise DataError(
            "demo: needs the template that comes with nilearn: pip install nilearn; or, from a cache that "
            "'simmp-fast prepare demo' wrote on another machine: simmp-fast demo --cache DIR"
        )
    name = f"mni_icbm152_{tissue}_tal_nlin_sym_09a_converted.nii.gz"
    return Path(package.origin).parent / "datasets" / "data" / name


@cache
def _template() -> tuple[Volume, Array]:
    """T1 [x, y, z], and its labels."""
    image = read_image(_file("t1"))
    grey, white = (read_image(_file(tissue)).array.astype(np.int16) for tissue in ("gm", "wm"))
    labels = 1 + np.argmax([255 - grey - white, grey, white], axis=0)
    return image, np.where(image.array > 0, labels, 0).astype(np.uint8)


def _slab(case_id: str) -> tuple[Volume, Array]:
    image, labels = _template()
    assert image.affine is not None
    first, stop = SLABS[case_id]
    affine = image.affine.copy()
    affine[:3, 3] += affine[:3, 2] * first
    slab = Volume(np.ascontiguousarray(image.array[..., first:stop]), affine, image.path)
    return slab, np.ascontiguousarray(labels[..., first:stop])
