"""Prepared slices and volumes, as npz or HDF5 files that hold an image and its label: files of a case become one stack.

Such files state no spacing and no orientation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np

from simmp_fast.data.errors import DataError
from simmp_fast.data.formats import Array, Volume, read_image, read_label
from simmp_fast.data.published import relative
from simmp_fast.data.sources import SourceCase, checked_label

# The files of one case by slice number; None stands for a volume in one file.
Stack = dict[int | None, Path]


def stacks(
    files: Iterable[Path], parse: Callable[[str], tuple[str, int | None] | None], problems: list[str]
) -> dict[str, Stack]:
    """Files by case; adds doubles to `problems`.

    Args:
        files: of any kind.
        parse: a file's name to case id and slice number (None for a volume), or None for another kind of file.
        problems: extended.
    """
    found: dict[str, Stack] = {}
    for file in files:
        if named := parse(file.name):
            case_id, number = named
            first = found.setdefault(case_id, {}).setdefault(number, file)
            if first != file:
                problems.append(f"{file}: has the same id as {first}")
    return found


def files_of(found: dict[str, Stack]) -> Iterator[Path]:
    """Every file of every case."""
    return (file for stack in found.values() for file in stack.values())


def one_kind(stack: Stack, slices: bool) -> Stack:
    """Of a case that is there both as slices and as a volume, the files of one of the two."""
    kept = {number: file for number, file in stack.items() if (number is not None) == slices}
    return kept or stack


def stack_case(
    case_id: str, stack: Stack, folder: Path, classes: Sequence[str], problems: list[str], slices: int | None = None
) -> SourceCase:
    """A case from its files; adds missing and surplus slices to `problems`.

    Args:
        case_id: its id.
        stack: its files, at least one: slices, or a volume.
        folder: of the data set.
        classes: names; a label is an index into them.
        problems: extended.
        slices: how many there must be, counted from 0; by default as many as the last number says, from 0 or 1.
    """
    if None in stack:
        files, where = [stack[None]], relative(stack[None], folder)
    else:
        numbers = sorted(n for n in stack if n is not None)
        first = 0 if slices is not None or 0 in numbers else 1
        last = numbers[-1] if slices is None else slices - 1
        surplus = [n for n in numbers if not first <= n <= last]
        if missing := last + 1 - first - (len(numbers) - len(surplus)):
            # Only the first few: a number in a name can be of any size.
            some = list(islice((n for n in range(first, last + 1) if n not in stack), 8))
            listed = ", ".join(map(str, some)) + (", ..." if missing > len(some) else "")
            problems.append(f"{case_id}: no file of slices {listed} ({missing} of {first} to {last} are missing)")
        problems += [f"{stack[n]}: a slice that the split has not, expected {first} to {last}" for n in surplus]
        files = [stack[n] for n in numbers]
        where = f"{relative(files[0], folder)} ({len(files)} slices)"
    return SourceCase(case_id, where, partial(_load, case_id, files, tuple(classes), None in stack, slices))


def _load(
    case_id: str, files: Sequence[Path], classes: Sequence[str], is_volume: bool, slices: int | None
) -> tuple[Volume, Array]:
    """The image `[d, h, w]` and its labels, uint8."""
    images: list[Volume] = []
    labels, problems = [], []
    for file in files:
        try:
            image = read_image(file)
            if not is_volume and len(image.shape) == 3 and image.shape[0] == 1:
                image = replace(image, array=image.array[0])
            label = checked_label(image, read_label(file), classes, {i: i for i in range(len(classes))}, "axial")
            _check_axes(image, is_volume, slices)
        except DataError as error:
            problems.append(str(error))
        else:
            images.append(image)
            labels.append(label)
    if not is_volume:
        problems += _odd_shapes(images)
    if problems:
        raise DataError("\n".join(problems))
    if is_volume:
        return images[0], labels[0]
    place = files[0].with_name(f"{case_id} (slices)")
    return Volume(np.stack([image.array for image in images]), None, place), np.stack(labels)


def _check_axes(image: Volume, is_volume: bool, slices: int | None) -> None:
    if image.colour or len(image.shape) != (3 if is_volume else 2):
        need = "[d, h, w]" if is_volume else "[h, w]"
        raise DataError(f"{image.path}: got an image of shape {list(image.array.shape)}, expected {need}")
    if is_volume and slices is not None and image.shape[0] != slices:
        raise DataError(f"{image.path}: got {image.shape[0]} slices, expected {slices} as the split says")


def _odd_shapes(images: Sequence[Volume]) -> list[str]:
    """A problem for each slice that has not the shape of most."""
    shapes = Counter(image.shape for image in images)
    usual = max(shapes, key=lambda shape: shapes[shape], default=())
    return [
        f"{image.path}: got shape {list(image.shape)}, expected {list(usual)} as most slices of the case have"
        for image in images
        if image.shape != usual
    ]
