"""Data sets: read, check, prepare, load."""

from simmp_fast.data.cache import Cache, Case
from simmp_fast.data.demo import demo_slice, demo_volume
from simmp_fast.data.errors import DataError
from simmp_fast.data.loader import slice_loader
from simmp_fast.data.prepare import prepare
from simmp_fast.data.preprocess import Geometry, Intensity, Recipe
from simmp_fast.data.registry import open_source

__all__ = [
    "Cache",
    "Case",
    "DataError",
    "Geometry",
    "Intensity",
    "Recipe",
    "demo_slice",
    "demo_volume",
    "open_source",
    "prepare",
    "slice_loader",
]
