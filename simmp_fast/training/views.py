"""The pictures in a run folder: a few validation slices, and the curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from simmp_fast.data.cache import Cache, Case
from simmp_fast.evaluation.inference import segment
from simmp_fast.pictures import Sample, save_curves, save_overlays
from simmp_fast.training.log import read_metrics


class RunPictures:
    """Draws `overlays.png` and `curves.png` anew after each validation.

    Args:
        folder: the run folder.
        cache: the data.
        split: where the slices come from; None draws curves alone.
        count: slices to draw: of as many cases, spread evenly over the split, the one with the most foreground.
    """

    def __init__(self, folder: Path, cache: Cache, split: str | None, count: int) -> None:
        self.folder, self.classes = folder, cache.classes
        cases = [] if split is None else [cache.case(name) for name in cache.splits[split]]
        chosen = np.linspace(0, len(cases) - 1, min(count, len(cases))).round().astype(int)
        self.slices = [(cases[i], _fullest_slice(cases[i])) for i in chosen]

    def draw(self, model: Any, metrics: Path, precision: str, title: str) -> None:
        """Segment the chosen slices and write both pictures."""
        if self.slices:
            self._draw_overlays(model, precision, title)
        save_curves(self.folder / "curves.png", [row for row in read_metrics(metrics) if row["kind"] != "epoch"])

    def _draw_overlays(self, model: Any, precision: str, title: str) -> None:
        images = [case.image(index) for case, index in self.slices]
        predictions = segment(model, images, len(self.classes), batch_size=len(images), precision=precision)
        samples = [
            Sample(image, np.asarray(case.labels[index]), prediction, f"{case.id}, slice {index}")
            for (case, index), image, prediction in zip(self.slices, images, predictions, strict=True)
        ]
        save_overlays(self.folder / "overlays.png", samples, self.classes, title)


def _fullest_slice(case: Case) -> int:
    """The slice of a case with the most foreground; the first of several."""
    return int(np.argmax([np.count_nonzero(labels) for labels in case.labels]))
