"""What surrounds the network: the metrics of a volume against their definition, and the data loader alone."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from simmp_fast.data.cache import Cache, CacheWriter
from simmp_fast.data.loader import slice_loader
from simmp_fast.data.preprocess import Geometry, Intensity, Recipe
from simmp_fast.evaluation.metrics import measure_classes

from . import timing
from .cases import Case
from .measure import Settings, describe
from .problems import SEED
from .rows import PARITY_FAILED, PASSED, Row

Labels = NDArray[np.uint8]
# Metrics that differ by less than this share are equal: they are the same sums in another order.
SAME = 1e-9


def _row(case: Case, backend: str, shape: dict[str, int], settings: Settings) -> Row:
    return Row(
        case.operator, case.group, case.label, 1, backend, "forward", shape, "", environment=settings.environment
    )


def organs(slices: int, side: int, classes: int) -> tuple[Labels, Labels]:
    """Truth and prediction: a volume of `classes` wavy ellipsoids, and the same ones shifted and a little smaller."""
    rng = np.random.default_rng(SEED)
    shape = (slices, side, side)
    grid = np.ogrid[tuple(slice(0, n) for n in shape)]
    waves = 1 + 0.15 * np.sin(60 * grid[0] / slices) * np.cos(30 * grid[1] / side) * np.sin(22 * grid[2] / side)
    truth, prediction = np.zeros(shape, np.uint8), np.zeros(shape, np.uint8)
    for label in range(1, classes + 1):
        centre = rng.uniform(0.25, 0.75, 3) * shape
        radius = rng.uniform(0.06, 0.18, 3) * shape + 1.5
        for target, shift, scale in ((truth, 0.0, 1.0), (prediction, 0.004 * side + 0.5, 0.96)):
            distance = sum(((g - c - shift) / (scale * r)) ** 2 for g, c, r in zip(grid, centre, radius, strict=True))
            target[distance <= waves] = label
    return truth, prediction


def by_definition(prediction: NDArray[np.bool_], truth: NDArray[np.bool_]) -> tuple[float, float, float, float]:
    """Dice, HD95, Jaccard and ASD on the full volume, each distance metric by its own two distance transforms."""

    def distances() -> NDArray[np.float64]:
        cross = ndimage.generate_binary_structure(prediction.ndim, 1)
        first, second = (mask & ~ndimage.binary_erosion(mask, cross) for mask in (prediction, truth))
        to_first, to_second = (ndimage.distance_transform_edt(~surface) for surface in (first, second))
        return np.concatenate([to_second[first], to_first[second]])

    common, total = np.count_nonzero(prediction & truth), np.count_nonzero(prediction) + np.count_nonzero(truth)
    hd95, asd = float(np.percentile(distances(), 95)), float(distances().mean())
    return 2 * common / total, hd95, common / (total - common), asd


def measure_evaluation(case: Case, settings: Settings) -> list[Row]:
    """`defined` classes by the definition, which takes a minute each at full size, and by the package; then all.

    The definition is computed once: its own noise is small beside the ratio.
    """
    sizes = case.sizes
    shape = {key: sizes[key] for key in ("slices", "side", "classes")}
    few = {**shape, "classes": min(sizes["defined"], sizes["classes"])}
    slow, fast = _row(case, "reference", few, settings), _row(case, "simmp_fast", few, settings)
    rows = [slow, fast]
    if few != shape:
        rows.append(_row(case, "simmp_fast", shape, settings))
    try:
        truth, prediction = organs(sizes["slices"], sizes["side"], sizes["classes"])
        start = time.perf_counter()
        expected = [by_definition(prediction == n, truth == n) for n in range(1, few["classes"] + 1)]
        _fill(slow, [1e3 * (time.perf_counter() - start)])
        slow.parity, slow.message = PASSED, "measured once"
        found = [_time_metrics(row, prediction, truth) for row in rows[1:]]
        _compare(slow, fast, found[0], expected)
        if few != shape:
            rows[2].message = f"the definition was computed for {few['classes']} of the classes"
    except Exception as error:
        for row in rows:
            row.status, row.message = describe(error)
    return rows


def _time_metrics(row: Row, prediction: Labels, truth: Labels) -> list[tuple[float | None, ...]]:
    """Fill in the times of the package's metrics of the row's classes; returns the metrics."""
    kept = row.shape["classes"]
    first, second = (np.where(labels <= kept, labels, 0).astype(np.uint8) for labels in (prediction, truth))
    samples = []
    for _ in range(timing.LEAST_ROUNDS):
        start = time.perf_counter()
        results = measure_classes(first, second, kept + 1)
        samples.append(1e3 * (time.perf_counter() - start))
    _fill(row, samples)
    return [(m.dice, m.hd95, m.jaccard, m.asd) for m in results]


def _compare(slow: Row, fast: Row, found: Sequence[Any], expected: Sequence[Any]) -> None:
    if np.allclose(np.array(found, dtype=float), np.array(expected), rtol=SAME, atol=0):
        fast.parity = PASSED
        ratios = [slow.samples_ms[0] / sample for sample in fast.samples_ms]
        fast.speedup_p20, fast.speedup, fast.speedup_p80 = timing.quantiles(ratios)
    else:
        fast.parity = PARITY_FAILED
        fast.message = f"got {found}, the definition gives {expected}"[:300]


def _fill(row: Row, samples: list[float]) -> None:
    row.p20_ms, row.median_ms, row.p80_ms = timing.quantiles(samples)
    row.samples_ms = [round(sample, 6) for sample in samples]


def write_cache(folder: Path, slices: int, side: int) -> Cache:
    """A prepared cache of noise, one channel and four classes."""
    rng = np.random.default_rng(SEED)
    recipe = Recipe("noise", ("background", "a", "b", "c"), 1, side, Intensity("range", 0, 1))
    images = rng.random((slices, 1, side, side), dtype=np.float32)
    labels = rng.integers(0, 4, (slices, side, side), dtype=np.uint8)
    with CacheWriter(folder, recipe, slices, "uint8") as writer:
        writer.add("noise", "noise", images, labels, labels, Geometry((slices, side, side)))
        writer.finish({"train": ["noise"], "validation": [], "test": []})
    return Cache.open(folder)


def measure_loader(case: Case, settings: Settings) -> list[Row]:
    """Images a second of the loader alone, augmentation included, over whole epochs."""
    sizes = dict(case.sizes)
    row = _row(case, "simmp_fast", sizes, settings)
    try:
        with tempfile.TemporaryDirectory() as folder:
            cache = write_cache(Path(folder), sizes["slices"], sizes["side"])
            samples, images = _epochs(cache, sizes, settings.seconds)
        _fill(row, samples)
        assert row.median_ms is not None
        row.rate = 1e3 * images / row.median_ms
        row.message = "one epoch; the start of its workers is counted" if sizes["workers"] else "one epoch"
    except Exception as error:
        row.status, row.message = describe(error)
    return [row]


def epoch(cache: Cache, sizes: dict[str, int], number: int) -> int:
    """Load every batch of one epoch; returns its images."""
    loader = slice_loader(cache, "train", sizes["batch"], seed=SEED, epoch=number, workers=sizes["workers"])
    return sum(len(batch) for batch, _ in loader)


def _epochs(cache: Cache, sizes: dict[str, int], seconds: float) -> tuple[list[float], int]:
    """Milliseconds of each epoch, and its images."""
    samples: list[float] = []
    images = 0
    while len(samples) < timing.LEAST_ROUNDS or (sum(samples) < 1e3 * seconds and len(samples) < timing.MOST_ROUNDS):
        start = time.perf_counter()
        images = epoch(cache, sizes, len(samples))
        samples.append(1e3 * (time.perf_counter() - start))
    return samples, images


MEASURES: dict[str, Callable[[Case, Settings], list[Row]]] = {
    "evaluation": measure_evaluation,
    "data_loader": measure_loader,
}
