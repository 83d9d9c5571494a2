"""What the loaders of published data sets share: finding files in a download, pairing them, naming what is amiss."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simmp_fast.data.errors import DataError, reading
from simmp_fast.data.names import listed, name_problem, nfc
from simmp_fast.data.preprocess import Intensity, Recipe
from simmp_fast.data.sources import SourceCase
from simmp_fast.messages import escaped


@dataclass(frozen=True)
class PublishedSource:
    """A data set found in a download; a `Source`.

    Attributes:
        name: the data set's name.
        classes: class names in the order of the labels, background first.
        channels: 1 or 3.
        intensity: how values become 0..1.
        cases: those of the split whose files are there.
        problems: files that are missing, doubled or without a counterpart.
        parts: "train", "validation" and "test" to case ids.
        left_out: a line for each kind of file in the download that is no part of it.
    """

    name: str
    classes: tuple[str, ...]
    channels: int
    intensity: Intensity
    cases: tuple[SourceCase, ...]
    problems: tuple[str, ...]
    parts: dict[str, list[str]]
    left_out: tuple[str, ...] = ()

    def recipe(self, image_size: int) -> Recipe:
        """How the files become the network's input."""
        return Recipe(self.name, self.classes, self.channels, image_size, self.intensity)

    def splits(self) -> dict[str, list[str]]:
        """ "train", "validation" and "test" to case ids."""
        return {name: list(ids) for name, ids in self.parts.items()}


def read_split(name: str) -> dict[str, Any]:
    """The published split and label order of a data set, from the package."""
    content: dict[str, Any] = json.loads((Path(__file__).parent / "splits" / f"{name}.json").read_text("utf-8"))
    return content


def files_below(folder: Path) -> list[Path]:
    """Every file below `folder` but hidden ones, in order.

    Raises:
        DataError: no such folder, one that cannot be read, or names that are not UTF-8.
    """
    with reading(folder):
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder")
        found = sorted(_walk(folder))
    if strange := [f"{escaped(str(file))}: {why}" for file in found if (why := name_problem(file.relative_to(folder)))]:
        raise DataError.listing(f"{folder}: cannot be used", strange)
    return found


def _walk(folder: Path) -> Iterator[Path]:
    def fail(error: OSError) -> None:
        raise error

    seen: set[str] = set()
    # Large data sets are often links to another disk; a link may also lead back to where it lies.
    for where, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        real = os.path.realpath(where)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        yield from (Path(where, name) for name in names if not name.startswith("."))


def unmatched(folder: Path, files: Iterable[Path], matched: Iterable[Path]) -> tuple[str, ...]:
    """What a download holds besides its data: for each extension how many files, and one of them."""
    others: dict[str, list[Path]] = {}
    taken = set(matched)
    for file in files:
        if file not in taken:
            others.setdefault(file.suffix.lower(), []).append(file)
    return tuple(
        f"{folder}: {len(found)} {kind or 'other'} file{'s' if len(found) > 1 else ''} with a name of no known form, "
        f"such as {relative(found[0], folder)}"
        for kind, found in sorted(others.items())
    )


def wrong_folder(folder: Path, looked_for: str) -> DataError:
    """The error for a folder that holds something else, or is none: what was looked for, and what is there."""
    with reading(folder):
        if not folder.is_dir():
            return DataError(f"{folder}: no such folder, looked for {looked_for}")
        there = sorted(f"{p.name}/" if p.is_dir() else p.name for p in folder.iterdir())
    return DataError(f"{folder}: looked for {looked_for}; found {listed(there) or 'nothing'}")


def by_id(files: Iterable[Path], pattern: str, problems: list[str]) -> dict[str, Path]:
    """Files whose names match, by the text of the pattern's groups in composed Unicode, joined with ``_``.

    Doubles are added to `problems`.
    """
    found: dict[str, Path] = {}
    for file in files:
        if match := re.fullmatch(pattern, file.name):
            key = nfc("_".join(match.groups()))
            first = found.setdefault(key, file)
            if first != file:
                problems.append(f"{file}: has the same id {key!r} as {first}")
    return found


def pairs(
    images: dict[str, Path], masks: dict[str, Path], ids: Sequence[str], problems: list[str]
) -> Iterator[tuple[str, Path, Path]]:
    """(id, image, mask) of the `ids` that have both; adds the others to `problems`."""
    for case_id in ids:
        image, mask = images.get(case_id), masks.get(case_id)
        if image is not None and mask is not None:
            yield case_id, image, mask
        elif image is not None:
            problems.append(f"{image}: an image without a mask (id {case_id!r})")
        elif mask is not None:
            problems.append(f"{mask}: a mask without an image (id {case_id!r})")
        else:
            problems.append(f"id {case_id!r}: neither image nor mask, expected both as the split names it")


def relative(file: Path, folder: Path) -> str:
    """A file's path below the folder of its data set, for messages and for the cache."""
    return file.relative_to(folder).as_posix()
