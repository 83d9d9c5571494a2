"""Synapse (BTCV): CT of the abdomen, eight organs; prepared slices and volumes, or raw NIfTI files."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

from simmp_fast.data.errors import DataError
from simmp_fast.data.formats import Array, Volume, read_image, read_label
from simmp_fast.data.preprocess import Intensity, geometry
from simmp_fast.data.published import (
    PublishedSource,
    by_id,
    files_below,
    pairs,
    read_split,
    relative,
    unmatched,
    wrong_folder,
)
from simmp_fast.data.sources import SourceCase, checked_label
from simmp_fast.data.stacks import files_of, one_kind, stack_case, stacks

SPLIT = read_split("synapse")
CLASSES = ("background", *SPLIT["label_order"].values())
PARTS = {"train": list(SPLIT["train_slices_per_case"]), "validation": [], "test": SPLIT["test_volumes"]}

# The labels 1 to 13 of the raw files.
RAW_ORGANS = (
    "spleen", "right kidney", "left kidney", "gallbladder", "oesophagus", "liver", "stomach", "aorta",
    "inferior vena cava", "portal and splenic vein", "pancreas", "right adrenal", "left adrenal",
)  # fmt: skip
RAW_VALUES = {0: 0} | {
    value: CLASSES.index(organ) if organ in CLASSES else 0 for value, organ in enumerate(RAW_ORGANS, start=1)
}
_LOOKED_FOR = (
    "case0005_slice000.npz and case0001.npy.h5 (prepared), or img0001.nii.gz and label0001.nii.gz (raw), here or below"
)


def synapse(folder: Path) -> PublishedSource:
    """Synapse in a download: one of the two layouts, whatever the folders below are called.

    Prepared: images in 0..1, labels in the released order. Raw: the window -125 to 275 HU becomes 0..1, and the 13
    labels become the released order of 8, the other organs background (data, Synapse).

    Raises:
        DataError: no such folder, neither layout in it, or both.
    """
    problems: list[str] = []
    files = files_below(folder)
    prepared = stacks(files, _prepared_name, problems)
    images = by_id(files, r"img(\d{4})\.nii(?:\.gz)?", problems)
    masks = by_id(files, r"label(\d{4})\.nii(?:\.gz)?", problems)
    if not (prepared or images or masks):
        raise wrong_folder(folder, _LOOKED_FOR)
    if prepared and (images or masks):
        raise DataError(f"{folder}: holds prepared and raw files, expected one of the two: name the folder of either")
    counts: dict[str, int] = SPLIT["train_slices_per_case"]
    ids = [*PARTS["train"], *PARTS["test"]]
    if prepared:
        problems += [f"{i}: no file of this case, which the split names" for i in ids if i not in prepared]
        chosen = {i: one_kind(prepared[i], slices=i in counts) for i in ids if i in prepared}
        cases = [stack_case(i, stack, folder, CLASSES, problems, counts.get(i)) for i, stack in chosen.items()]
        intensity = Intensity("range", 0, 1)
    else:
        cases = [
            SourceCase(f"case{i}", relative(image, folder), partial(_load_raw, image, mask, counts.get(f"case{i}")))
            for i, image, mask in pairs(images, masks, [i.removeprefix("case") for i in ids], problems)
        ]
        intensity = Intensity("window", -125, 275)
    left_out = unmatched(folder, files, (*images.values(), *masks.values(), *files_of(prepared)))
    return PublishedSource("synapse", CLASSES, 1, intensity, tuple(cases), tuple(problems), PARTS, left_out)


def _prepared_name(name: str) -> tuple[str, int | None] | None:
    match = re.fullmatch(r"(case\d{4})(?:_slice(\d{3})\.npz|\.npy\.h5)", name)
    return match and (match[1], int(match[2]) if match[2] else None)


def _load_raw(image_path: Path, mask_path: Path, slices: int | None) -> tuple[Volume, Array]:
    image, mask = read_image(image_path), read_label(mask_path)
    labels = checked_label(image, mask, CLASSES, RAW_VALUES, "axial")
    # Every abdomen has the veins 9 and 10; without them these are labels in another order, which would be misread.
    if mask.array.max() < 9:
        raise DataError(
            f"{mask_path}: got no label above {mask.array.max()}, expected the raw labels 1 to 13 "
            f"(9 is the {RAW_ORGANS[8]}); these seem to be mapped to another order already"
        )
    count = geometry(image).slice_shape[0]
    if slices is not None and count != slices:
        raise DataError(f"{image_path}: got {count} slices, expected {slices} as the split says")
    return image, labels
