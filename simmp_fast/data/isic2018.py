"""ISIC-2018, task 1: dermoscopic pictures, the lesion."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from simmp_fast.data.formats import Array, Volume, read_image, read_label
from simmp_fast.data.preprocess import Intensity
from simmp_fast.data.published import PublishedSource, by_id, files_below, pairs, relative, unmatched, wrong_folder
from simmp_fast.data.sources import SourceCase, checked_label, drawn

CLASSES = ("background", "lesion")
IMAGES, MASKS = "ISIC2018_Task1-2_Training_Input", "ISIC2018_Task1_Training_GroundTruth"
COUNTS = {"train": 1815, "validation": 259, "test": 520}
SEED = 2222


def isic2018(folder: Path) -> PublishedSource:
    """ISIC-2018 in a download: the folders `IMAGES` and `MASKS`, as their archives name them.

    The published split has these sizes but came from an unsorted directory listing; here the ids are drawn by checksum,
    the same everywhere (data, ISIC-2018).

    Raises:
        DataError: no such folder, or not these two in it.
    """
    if not ((folder / IMAGES).is_dir() and (folder / MASKS).is_dir()):
        raise wrong_folder(folder, f"the folders {IMAGES} and {MASKS}")
    problems: list[str] = []
    inputs, truths = files_below(folder / IMAGES), files_below(folder / MASKS)
    images = by_id(inputs, r"(ISIC_\d{7})\.jpg", problems)
    masks = by_id(truths, r"(ISIC_\d{7})_segmentation\.png", problems)
    cases = [
        SourceCase(i, relative(image, folder), partial(_load, image, mask))
        for i, image, mask in pairs(images, masks, sorted(images.keys() | masks.keys()), problems)
    ]
    need = sum(COUNTS.values())
    if len(images) != need:
        problems.append(f"{folder / IMAGES}: got {len(images)} images, expected {need}: the split is of all")
    order = drawn(images, SEED)
    ends = COUNTS["train"], COUNTS["train"] + COUNTS["validation"]
    parts = {"train": order[: ends[0]], "validation": order[ends[0] : ends[1]], "test": order[ends[1] :]}
    parts = {name: sorted(ids) for name, ids in parts.items()}
    left_out = unmatched(folder, [*inputs, *truths], [*images.values(), *masks.values()])
    intensity = Intensity("range", 0, 255)
    return PublishedSource("isic2018", CLASSES, 3, intensity, tuple(cases), tuple(problems), parts, left_out)


def _load(image_path: Path, mask_path: Path) -> tuple[Volume, Array]:
    image = read_image(image_path)
    return image, checked_label(image, read_label(mask_path), CLASSES, {0: 0, 255: 1}, "axial")
