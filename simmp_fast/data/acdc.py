"""ACDC: cine MRI of the heart at two phases, three structures; raw NIfTI frames, or prepared slices and volumes."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from simmp_fast.config import ConfigError
from simmp_fast.data.errors import DataError
from simmp_fast.data.formats import Array, Volume, read_image, read_label
from simmp_fast.data.preprocess import Intensity
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
from simmp_fast.data.stacks import Stack, files_of, one_kind, stack_case, stacks

SPLITS = read_split("acdc")
CLASSES = ("background", *SPLITS.pop("label_order").values())
PATIENTS = range(1, 101)  # those with published labels when the splits were drawn

# Names of prepared files in circulation: patient, phase or frame, slice. A volume has no slice.
_PREPARED = (
    r"case_(?P<patient>\d{3})_slice(?P<phase>ED|ES)_(?P<slice>\d+)\.npz",
    r"case_(?P<patient>\d{3})_volume_(?P<phase>ED|ES)\.npz",
    r"patient(?P<patient>\d{3})_frame(?P<phase>\d{2})(?:_slice_)?(?P<slice>\d*)\.(?:npz|h5)",
    r"patient(?P<patient>\d{3})(?P<phase>\d{2})\.npy\.h5",
)
_LOOKED_FOR = (
    "patient001_frame01.nii.gz and patient001_frame01_gt.nii.gz (raw), or prepared files such as "
    "case_001_sliceED_0.npz and case_002_volume_ED.npz, or patient001_frame010.npz and patient00801.npy.h5; here or "
    "below"
)


def acdc(folder: Path, split: str = "released") -> PublishedSource:
    """ACDC in a download: one of the two layouts, whatever the folders below are called.

    A case is one phase of one patient. Raw: percentiles 0.5 and 99.5 of a case become 0 and 1. Prepared: its smallest
    and largest value do, which changes nothing where that was done before (data, ACDC).

    Args:
        folder: of the download.
        split: "released", "mt_unet" or "ssl4mis".

    Raises:
        ConfigError: an unknown split.
        DataError: no such folder, neither layout in it, or both.
    """
    if split not in SPLITS:
        raise ConfigError(f"split: got {split!r}, expected one of {', '.join(SPLITS)}")
    problems: list[str] = []
    files = files_below(folder)
    images = by_id(files, r"(patient\d{3})_(frame\d{2})\.nii(?:\.gz)?", problems)
    masks = by_id(files, r"(patient\d{3})_(frame\d{2})_gt\.nii(?:\.gz)?", problems)
    prepared = stacks(files, _prepared_name, problems)
    if not (prepared or images or masks):
        raise wrong_folder(folder, _LOOKED_FOR)
    if prepared and (images or masks):
        raise DataError(f"{folder}: holds raw and prepared files, expected one of the two: name the folder of either")
    ids = _two_phases([*prepared, *images, *(i for i in masks if i not in images)], problems)
    parts = _parts(ids, split)
    if prepared:
        chosen = {i: one_kind(prepared[i], slices=i in parts["train"]) for i in ids}
        cases = [stack_case(i, stack, folder, CLASSES, problems) for i, stack in chosen.items()]
        problems += _slice_count(folder, [chosen[i] for i in parts["train"]], split)
        intensity = Intensity("percentile", 0, 100)
    else:
        cases = [
            SourceCase(i, relative(image, folder), partial(_load_raw, image, mask))
            for i, image, mask in pairs(images, masks, ids, problems)
        ]
        intensity = Intensity("percentile", 0.5, 99.5)
    left_out = unmatched(folder, files, (*images.values(), *masks.values(), *files_of(prepared)))
    return PublishedSource("acdc", CLASSES, 1, intensity, tuple(cases), tuple(problems), parts, left_out)


def _prepared_name(name: str) -> tuple[str, int | None] | None:
    for pattern in _PREPARED:
        if match := re.fullmatch(pattern, name):
            groups = match.groupdict()
            phase = groups["phase"] if groups["phase"].isalpha() else f"frame{groups['phase']}"
            return f"patient{groups['patient']}_{phase}", int(groups["slice"]) if groups.get("slice") else None
    return None


def _patient(case_id: str) -> int:
    return int(case_id[len("patient") :][:3])


def _two_phases(found: Iterable[str], problems: list[str]) -> list[str]:
    """Case ids of the patients of the split; adds to `problems` those who have not two phases."""
    phases: dict[int, list[str]] = defaultdict(list)
    for case_id in sorted(found):
        phases[_patient(case_id)].append(case_id)
    for patient in PATIENTS:
        if len(phases[patient]) != 2:
            got = ", ".join(phases[patient]) or "none"
            problems.append(f"patient{patient:03d}: got {got}, expected two phases (end of diastole, end of systole)")
    return [case_id for patient in PATIENTS for case_id in phases[patient]]


def _parts(ids: Iterable[str], split: str) -> dict[str, list[str]]:
    parts: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    chosen = SPLITS[split]
    for case_id in ids:
        patient = _patient(case_id)
        held_out = [part for part in ("validation", "test") if patient in chosen[f"{part}_patients"]]
        parts[held_out[0] if held_out else "train"].append(case_id)
    return parts


def _slice_count(folder: Path, train: Iterable[Stack], split: str) -> list[str]:
    """A problem where training slices are missing at the end of a stack, which their numbers alone do not show."""
    numbers = [number for stack in train for number in stack]
    need = SPLITS[split]["train_slices"]
    if None in numbers or len(numbers) == need:
        return []
    return [f"{folder}: got {len(numbers)} training slices, expected {need} as the split {split!r} has"]


def _load_raw(image_path: Path, mask_path: Path) -> tuple[Volume, Array]:
    # The sform of ACDC files has 1 mm in all directions, wrongly.
    image, mask = read_image(image_path, header_spacing=True), read_label(mask_path, header_spacing=True)
    return image, checked_label(image, mask, CLASSES, {i: i for i in range(len(CLASSES))}, "axial")
