"""A stand-in for the network, and how to make a small prepared cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from simmp_fast.data.cache import Cache, CacheWriter
from simmp_fast.data.preprocess import Geometry, Recipe, resize_label

SIDE = 16
# Of a file that states its spacing.
AFFINE = ((3.0, 0.0, 0.0, 0.0), (0.0, 0.5, 0.0, 0.0), (0.0, 0.0, 0.75, 0.0), (0.0, 0.0, 0.0, 1.0))


class LevelModel(nn.Module):
    """Class k where the mean of the channels is nearest to k / (classes - 1), as four heads that sum to the logits.

    Batch norm, dropout and a counter make it sensitive to a training flag or a state that evaluation must not touch.
    """

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.levels = nn.Parameter(torch.linspace(0, 1, classes))
        self.norm = nn.BatchNorm2d(1, eps=1e-12, affine=False)
        self.drop = nn.Dropout(0.5)
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, image: Tensor) -> list[Tensor]:
        if self.training:
            self.calls += 1
        grey = self.drop(self.norm(image.mean(1, keepdim=True)))
        logits = -50 * (grey - self.levels[:, None, None]).abs()
        return [share * logits for share in (0.1, 0.2, 0.3, 0.4)]


def make_cache(folder: Path, recipe: Recipe, cases: dict[str, tuple[np.ndarray, np.ndarray, Geometry]]) -> Cache:
    """A cache whose test split holds `cases`: images `[slices, C, S1, S1]`, native labels, geometry."""
    folder.mkdir()
    with CacheWriter(folder, recipe, sum(len(images) for images, _, _ in cases.values()), "uint8") as writer:
        for name, (images, native, placed) in cases.items():
            labels = resize_label(native, (recipe.image_size, recipe.image_size))
            writer.add(name, f"{name}.nii.gz", images, labels, native, placed)
        writer.finish({"train": [], "validation": [], "test": list(cases)})
    return Cache.open(folder)
