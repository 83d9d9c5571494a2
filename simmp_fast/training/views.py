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
        count: slices to draw: those with the most foreground in as many parts of the split.
    """

    def __init__(self, folder: Path, cache: Cache, split: str | None, count: int) -> None:
        self.folder, self.classes = folder, cache.classes
        names = [] if split is None else cache.splits[split]
        places = [(case, index) for case in map(cache.case, names) for index in range(case.slices)]
        parts = np.array_split(np.arange(len(places)), min(count, len(places)) or 1)
        self.slices = [_fullest([places[i] for i in part]) for part in parts if len(part)] if count else []

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


def _fullest(places: list[tuple[Case, int]]) -> tuple[Case, int]:
    """The slice with the most foreground; the first of several."""
    return places[int(np.argmax([np.count_nonzero(case.labels[index]) for case, index in places]))]
