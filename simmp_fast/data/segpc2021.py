"""SegPC-2021: microscopic pictures of plasma cells, their cytoplasm and nucleus."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from simmp_fast.data.errors import DataError
from simmp_fast.data.formats import Array, Volume, read_image, read_label
from simmp_fast.data.names import nfc
from simmp_fast.data.preprocess import Intensity
from simmp_fast.data.published import PublishedSource, by_id, files_below, relative, unmatched, wrong_folder
from simmp_fast.data.sources import SourceCase, checked_label, drawn

CLASSES = ("background", "cytoplasm", "nucleus")
MASK_VALUES = {0: 0, 20: 1, 40: 2}
COUNTS = {"train": 298, "validation": 200}  # labelled images in the two folders
VALIDATION = 30  # of the training folder, to choose a checkpoint with
SEED = 2222


def segpc2021(folder: Path) -> PublishedSource:
    """SegPC-2021 in a download: the folders train/x, train/y, validation/x and validation/y.

    The published split is not known, so results compare with no published table. Here the folder "validation" is the
    test split, and the validation split is drawn by checksum from the folder "train" (data, SegPC-2021).

    Raises:
        DataError: no such folder, or not these four in it.
    """
    if not all((folder / part / kind).is_dir() for part in COUNTS for kind in "xy"):
        raise wrong_folder(folder, "the folders train/x, train/y, validation/x and validation/y")
    problems: list[str] = []
    left_out: list[str] = []
    found = {part: _cases(folder, part, problems, left_out) for part in COUNTS}
    order = drawn([case.id for case in found["train"]], SEED)
    parts = {
        "train": sorted(order[VALIDATION:]),
        "validation": sorted(order[:VALIDATION]),
        "test": [case.id for case in found["validation"]],
    }
    cases = (*found["train"], *found["validation"])
    intensity = Intensity("range", 0, 255)
    return PublishedSource("segpc2021", CLASSES, 3, intensity, cases, tuple(problems), parts, tuple(left_out))


def _cases(folder: Path, part: str, problems: list[str], left_out: list[str]) -> list[SourceCase]:
    """The cases of one folder: an image, and the masks of its cells."""
    inputs, truths = files_below(folder / part / "x"), files_below(folder / part / "y")
    images = by_id(inputs, r"(.+)\.bmp", problems)
    masks: dict[str, list[Path]] = defaultdict(list)
    for file in truths:
        if match := re.fullmatch(r"(.+)_\d+\.bmp", file.name):
            masks[nfc(match[1])].append(file)
    matched = [*images.values(), *(file for cells in masks.values() for file in cells)]
    left_out += unmatched(folder / part, [*inputs, *truths], matched)
    problems += [f"{image}: an image without a mask (id {i!r})" for i, image in images.items() if i not in masks]
    problems += [
        f"{file}: a mask without an image (id {i!r})" for i in masks if i not in images for file in masks[i]
    ]  # fmt: skip
    if len(images) != COUNTS[part]:
        problems.append(f"{folder / part / 'x'}: got {len(images)} images, expected {COUNTS[part]}")
    # The two folders count their images alike.
    return [
        SourceCase(f"{part}_{i}", relative(images[i], folder), partial(_load, images[i], tuple(masks[i])))
        for i in sorted(images.keys() & masks.keys())
    ]


def _load(image_path: Path, mask_paths: Sequence[Path]) -> tuple[Volume, Array]:
    """The image, and the masks of its cells in one; where two cells overlap, nucleus goes before cytoplasm."""
    image = read_image(image_path)
    merged = np.zeros(image.shape, np.uint8)
    problems = []
    for path in mask_paths:
        try:
            np.maximum(merged, checked_label(image, read_label(path), CLASSES, MASK_VALUES, "axial"), out=merged)
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("\n".join(problems))
    return image, merged
