"""The demo in tests: what needs its template, and a stand-in for its cache where the template is not needed."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from simmp_fast.data import Cache, Geometry, Intensity, Recipe
from simmp_fast.data.cache import CacheWriter
from simmp_fast.data.demo import CLASSES, SPLITS

needs_template = pytest.mark.skipif(
    find_spec("nilearn") is None, reason="the demo's template comes with nilearn, which is not installed"
)


def demo_cache(folder: Path, side: int = 64, slices: int = 4) -> Cache:
    """A cache as `prepare demo` writes it, of random slices: ``slices`` of ``side x side`` pixels in every slab."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    ids = [case_id for part in SPLITS.values() for case_id in part]
    recipe = Recipe("demo", CLASSES, 1, side, Intensity("range", 0, 255))
    with CacheWriter(folder, recipe, slices * len(ids), "uint8") as writer:
        for case_id in ids:
            labels = rng.integers(0, len(CLASSES), (slices, side, side)).astype(np.uint8)
            images = (labels[:, None] / len(CLASSES) + rng.random((slices, 1, side, side)) / 8).astype(np.float32)
            writer.add(case_id, "template", images, labels, labels, Geometry((slices, side, side)))
        writer.finish({name: list(part) for name, part in SPLITS.items()})
    return Cache.open(folder)
