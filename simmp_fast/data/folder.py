"""Your own data set: a folder of images and masks, described by a YAML file."""

from __future__ import annotations

import errno
import os
from functools import partial
from pathlib import Path

from simmp_fast.config import ConfigError
from simmp_fast.data.description import check_image_size, read_description
from simmp_fast.data.errors import DataError, reading, refuse_other_than_utf8
from simmp_fast.data.formats import ARRAYS, EXTENSIONS, PICTURES, Array, Volume, extension, read_image, read_label, stem
from simmp_fast.data.names import forms, listed, name_problem, nfc
from simmp_fast.data.preprocess import Intensity, Recipe
from simmp_fast.data.sources import SourceCase, checked_label
from simmp_fast.messages import escaped, why_no_file


class FolderSource:
    """Images and masks paired by name, in composed Unicode.

    Args:
        path: the YAML file; the folders it names are relative to its own.

    Attributes:
        name: the data set's name.
        description: the YAML file's content.
        cases: one for each pair, in the order of their ids.
        problems: images without a mask, masks without an image, ids that occur twice, names that are not UTF-8, and
            links or pipes where a file should be.
        left_out: a line for everything else in the folders, hidden names aside: it serves neither as image nor as mask.

    Raises:
        ConfigError: the YAML file cannot be used.
        DataError: a folder is missing, cannot be read or has no files of a known kind; a name is not UTF-8.
    """

    def __init__(self, path: str | Path) -> None:
        refuse_other_than_utf8(path)
        self._root = Path(path).parent
        self.description = read_description(path)
        self.name = self.description.name
        self.problems: list[str] = []
        self.cases: list[SourceCase] = []
        self._unusable: dict[Path, str] = {}  # files that take part in the pairing, and why they cannot be read
        self._ignored: dict[Path, list[str]] = {}
        used = self._pair()
        self.problems = list(map(escaped, self.problems))
        parents = {parent for file in used for parent in file.parents}
        self.left_out = [
            escaped(f"{file}: {'; '.join(dict.fromkeys(whys))}")
            for file, whys in sorted(self._ignored.items())
            if file not in used and file not in parents and file != Path(path)
        ]

    def recipe(self, image_size: int) -> Recipe:
        """How the files become the network's input, with the description's defaults filled in.

        Raises:
            ConfigError: an image size that the network cannot take.
        """
        check_image_size(image_size)
        d = self.description
        return Recipe(d.name, d.classes, d.channels, image_size, self._intensity(), d.slice_axis)

    def splits(self) -> dict[str, list[str]]:
        """ "train", "validation" and "test" to case ids; raises `ConfigError` if the description's do not fit."""
        ids = [case.id for case in self.cases]
        return (self.description.split_ids or self.description.split).assign(ids)

    def _intensity(self) -> Intensity:
        if self.description.intensity is not None:
            return self.description.intensity
        pictures = all(extension(case.source) in PICTURES for case in self.cases)
        return Intensity("range", 0, 255) if pictures else Intensity("percentile", 0.5, 99.5)

    def _pair(self) -> set[Path]:
        """Make the cases; returns all files that were taken for images or masks."""
        d = self.description
        images = self._find("images", d.images, d.image_suffix)
        if d.masks is None:
            masks = [file for file in images if extension(file) in ARRAYS]
            self.problems += [
                f"{file}: masks is null, which needs npz or HDF5 files" for file in images if file not in masks
            ]
        else:
            masks = self._find("masks", d.masks, d.mask_suffix)
            # With both in one folder, the longer suffix tells which is which.
            if len(d.mask_suffix) > len(d.image_suffix):
                images = sorted(set(images) - set(masks))
            elif len(d.mask_suffix) < len(d.image_suffix):
                masks = sorted(set(masks) - set(images))
        self.problems += [f"{file}: {why}" for file, why in sorted(self._unusable.items())]
        by_image = self._by_id(images, d.image_suffix)
        by_mask = self._by_id(masks, d.image_suffix if d.masks is None else d.mask_suffix)
        for case_id in sorted(by_image.keys() | by_mask.keys()):
            self._add(case_id, by_image.get(case_id), by_mask.get(case_id))
        return {*images, *masks}

    def _add(self, case_id: str, image: Path | None, mask: Path | None) -> None:
        if image is None:
            self.problems.append(f"{mask}: a mask without an image (id {case_id!r})")
        elif mask is None:
            if self.description.masks is not None:
                self.problems.append(f"{image}: an image without a mask (id {case_id!r})")
        elif image not in self._unusable and mask not in self._unusable:
            source = image.relative_to(self._root) if image.is_relative_to(self._root) else image
            self.cases.append(SourceCase(case_id, source.as_posix(), partial(self._load, image, mask)))

    def _find(self, key: str, where: str, suffix: str) -> list[Path]:
        """Files of a known kind in a folder or matching a pattern, whose names end with `suffix`."""
        folder = self._root / where
        with reading(folder):
            entries = [path for path in self._entries(key, where) if not path.name.startswith(".")]
            known = []
            for path in entries:
                if why := _no_candidate(path, suffix):
                    self._ignored.setdefault(path, []).append(why)
                    continue
                known.append(path)
                if why := _why_unusable(path, self._root):
                    self._unusable[path] = why
        if not known:
            ending = f" with names that end in {suffix!r}" if suffix else ""
            there = listed(f"{path.name}/" if path.is_dir() else path.name for path in entries) or "nothing"
            need = f"expected files of kind {', '.join(EXTENSIONS)}{ending}"
            raise DataError(f"{folder}: no {key}, {need}; found {there}")
        return known

    def _entries(self, key: str, where: str) -> list[Path]:
        """All that lies in a folder, or matches a pattern."""
        folder = self._root / where
        for form in forms(where):
            if (self._root / form).is_dir():
                return sorted((self._root / form).iterdir())
        if not any(c in where for c in "*?["):
            what = "no such folder" if not folder.exists() else "is no folder, expected a folder or a pattern"
            raise DataError(f"{folder}: {what} ({key} of {self.name!r})")
        base = Path(folder.anchor) if Path(where).is_absolute() else self._root
        found: set[Path] = set()
        for form in forms(where.removeprefix(folder.anchor) if Path(where).is_absolute() else where):
            try:
                _refuse_unreadable(base, Path(form))
                found.update(base.glob(form))
            except ValueError as error:
                raise ConfigError(f"{key}: got {where!r}, expected a folder or a pattern ({error})") from None
        return sorted(found)

    def _by_id(self, files: list[Path], suffix: str) -> dict[str, Path]:
        paired: dict[str, Path] = {}
        for file in files:
            case_id = nfc(stem(file)).removesuffix(suffix)
            first = paired.setdefault(case_id, file)
            if first != file:
                alike = "" if stem(first) == stem(file) else ", in other Unicode characters that read alike"
                self.problems.append(f"{file}: has the same id {case_id!r} as {first}{alike}")
        return paired

    def _load(self, image_path: Path, mask_path: Path) -> tuple[Volume, Array]:
        d = self.description
        image = read_image(image_path)
        return image, checked_label(image, read_label(mask_path), d.classes, d.mask_values, d.slice_axis)


def _refuse_unreadable(base: Path, pattern: Path) -> None:
    """Raise `PermissionError` for a folder on the way of `pattern` that cannot be read: `glob` leaves it out."""
    for depth in range(len(pattern.parts)):
        for path in base.glob(str(Path(*pattern.parts[:depth]))) if depth else [base]:
            if path.is_dir() and not os.access(path, os.R_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


def _no_candidate(path: Path, suffix: str) -> str | None:
    """Why `path` is not taken for an image or a mask, or None."""
    if path.is_dir():
        return "a folder, not looked into"
    if not extension(path):
        return "unknown kind of file"
    return None if nfc(stem(path)).endswith(suffix) else f"its name does not end in {suffix!r}"


def _why_unusable(path: Path, root: Path) -> str | None:
    """Why a file cannot be read whatever it holds, or None."""
    inside = path.relative_to(root) if path.is_relative_to(root) else path
    return name_problem(inside) or why_no_file(path)
