"""Your own data set: a folder of images and masks, described by a YAML file."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from simmp_fast.data.description import read_description
from simmp_fast.data.errors import DataError
from simmp_fast.data.formats import ARRAYS, EXTENSIONS, PICTURES, Array, Volume, extension, read_image, read_label, stem
from simmp_fast.data.preprocess import Intensity, Recipe
from simmp_fast.data.sources import SourceCase, checked_label


class FolderSource:
    """Images and masks paired by name.

    Args:
        path: the YAML file; the folders it names are relative to its own.

    Attributes:
        name: the data set's name.
        description: the YAML file's content.
        cases: one for each pair, in the order of their ids.
        problems: images without a mask, masks without an image, ids that occur twice.

    Raises:
        ConfigError: the YAML file cannot be used.
        DataError: a folder is missing or has no files of a known kind.
    """

    def __init__(self, path: str | Path) -> None:
        self._root = Path(path).parent
        self.description = read_description(path)
        self.name = self.description.name
        self.problems: list[str] = []
        self.cases: list[SourceCase] = []
        self._pair()

    def recipe(self, image_size: int) -> Recipe:
        """How the files become the network's input, with the description's defaults filled in."""
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

    def _pair(self) -> None:
        d = self.description
        images = self._find("images", d.images, d.image_suffix)
        if d.masks is None:
            masks = {file: file for file in images if extension(file) in ARRAYS}
            self.problems += [
                f"{file}: masks is null, which needs npz or HDF5 files" for file in images if file not in masks
            ]
            paired_masks = self._by_id(list(masks), d.image_suffix)
        else:
            found = self._find("masks", d.masks, d.mask_suffix)
            # With both in one folder, the longer suffix tells which is which.
            if len(d.mask_suffix) > len(d.image_suffix):
                images = [file for file in images if file not in found]
            elif len(d.mask_suffix) < len(d.image_suffix):
                found = [file for file in found if file not in images]
            paired_masks = self._by_id(found, d.mask_suffix)
        paired_images = self._by_id(images, d.image_suffix)
        for case_id in sorted(paired_images.keys() | paired_masks.keys()):
            image, mask = paired_images.get(case_id), paired_masks.get(case_id)
            if image is None:
                self.problems.append(f"{mask}: a mask without an image (id {case_id!r})")
            elif mask is None and d.masks is not None:
                self.problems.append(f"{image}: an image without a mask (id {case_id!r})")
            elif mask is not None:
                source = image.relative_to(self._root) if image.is_relative_to(self._root) else image
                self.cases.append(SourceCase(case_id, source.as_posix(), partial(self._load, image, mask)))

    def _find(self, key: str, where: str, suffix: str) -> list[Path]:
        """Files of a known kind in a folder or matching a pattern, whose names end with `suffix`."""
        folder = self._root / where
        if folder.is_dir():
            files = sorted(folder.iterdir())
        elif any(c in where for c in "*?["):
            base, pattern = (Path("/"), where.lstrip("/")) if Path(where).is_absolute() else (self._root, where)
            files = sorted(base.glob(pattern))
        else:
            raise DataError(f"{folder}: no such folder ({key} of {self.name!r})")
        known = [f for f in files if f.is_file() and extension(f) and not f.name.startswith(".")]
        known = [f for f in known if stem(f).endswith(suffix)]
        if not known:
            ending = f" with names that end in {suffix!r}" if suffix else ""
            raise DataError(f"{folder}: no {key}, expected files of kind {', '.join(EXTENSIONS)}{ending}")
        return known

    def _by_id(self, files: list[Path], suffix: str) -> dict[str, Path]:
        paired: dict[str, Path] = {}
        for file in files:
            case_id = stem(file).removesuffix(suffix)
            if case_id in paired:
                self.problems.append(f"{file}: has the same id {case_id!r} as {paired[case_id]}")
            else:
                paired[case_id] = file
        return paired

    def _load(self, image_path: Path, mask_path: Path) -> tuple[Volume, Array]:
        d = self.description
        image = read_image(image_path)
        return image, checked_label(image, read_label(mask_path), d.classes, d.mask_values, d.slice_axis)
