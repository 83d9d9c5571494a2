"""The YAML file that describes your own data set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from simmp_fast.bounds import MAX_IMAGE_SIZE
from simmp_fast.config import ConfigError, from_mapping, read_yaml
from simmp_fast.data.names import listed, nfc
from simmp_fast.data.preprocess import Intensity, Recipe
from simmp_fast.data.sources import drawn
from simmp_fast.messages import has_control, shown


@dataclass(frozen=True)
class Split:
    """Shares of the cases; which case falls where depends only on its id and the seed.

    Attributes:
        train: share for training; None takes what the other two leave.
        validation, test: their shares.
        seed: another seed gives another split.
    """

    train: float | None = None
    validation: float = 0.1
    test: float = 0.2
    seed: int = 2222

    def __post_init__(self) -> None:
        for key in ("train", "validation", "test"):
            share = getattr(self, key)
            if share is not None and not 0 <= share <= 1:
                raise ConfigError(f"split.{key}: got {share}, expected a share from 0 to 1")
        held_out = self.validation + self.test
        if self.train is None:
            object.__setattr__(self, "train", round(max(0.0, 1 - held_out), 9))
        train = cast("float", self.train)
        if abs(train + held_out - 1) > 1e-6 or train == 0:
            raise ConfigError(
                f"split: got shares that add up to {train + held_out:g} (train {train:g}, validation "
                f"{self.validation:g}, test {self.test:g}), expected 1, with some for train"
            )

    def assign(self, ids: Sequence[str]) -> dict[str, list[str]]:
        """Split case ids. Validation and test get at least one case each if their share is not 0.

        Raises:
            ConfigError: too few cases.
        """
        order = drawn(ids, self.seed)
        validation = max(1, round(self.validation * len(ids))) if self.validation else 0
        test = max(1, round(self.test * len(ids))) if self.test else 0
        train = len(ids) - validation - test
        if train < 1:
            raise ConfigError(
                f"split: got {len(ids)} cases, expected at least {validation + test + 1} for these shares"
            )
        return {
            "train": sorted(order[:train]),
            "validation": sorted(order[train : train + validation]),
            "test": sorted(order[train + validation :]),
        }


@dataclass(frozen=True)
class SplitIds:
    """The split as explicit lists of case ids, compared in composed Unicode; a case in none of them is left out."""

    train: tuple[str, ...]
    validation: tuple[str, ...] = ()
    test: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for part in ("train", "validation", "test"):
            object.__setattr__(self, part, tuple(map(nfc, getattr(self, part))))
        if not self.train:
            raise ConfigError("split_ids.train: got an empty list, expected at least one id")
        counts = Counter((*self.train, *self.validation, *self.test))
        twice = sorted(i for i, count in counts.items() if count > 1)
        if twice:
            raise ConfigError(f"split_ids: got {listed(twice)} more than once, expected each id in one list")

    def assign(self, ids: Sequence[str]) -> dict[str, list[str]]:
        """The lists, if every id is one of `ids`; raises `ConfigError` otherwise."""
        parts = {"train": list(self.train), "validation": list(self.validation), "test": list(self.test)}
        for name, part in parts.items():
            unknown = sorted(set(part) - set(map(nfc, ids)))
            if unknown:
                raise ConfigError(f"split_ids.{name}: no such cases: {listed(unknown)}")
        return parts


@dataclass(frozen=True)
class Description:
    """Your own data set: the keys of its YAML file. Names and suffixes are kept in composed Unicode.

    Attributes:
        name: the data set's name.
        classes: class names in the order of the labels, background first.
        images: a folder, or a pattern such as ``scans/*_t1.nii.gz``; relative to the YAML file.
        masks: likewise; None if every image file is npz or HDF5 with its own `label`.
        image_suffix: what an image's name ends with before the extension; a case's id is the name without it.
        mask_suffix: likewise for masks.
        channels: 1 or 3; a grey image serves as three equal channels.
        intensity: how values become 0..1; by default 0 to 255 for pictures, percentiles 0.5 to 99.5 for volumes.
        slice_axis: "axial", "coronal" or "sagittal"; for NIfTI.
        mask_values: value in the mask to class, such as ``{0: 0, 255: 1}``; by default the values are the classes.
        split: shares of the cases.
        split_ids: explicit lists of case ids instead.
    """

    name: str
    classes: tuple[str, ...]
    images: str = "images"
    masks: str | None = "masks"
    image_suffix: str = ""
    mask_suffix: str = ""
    channels: int = 1
    intensity: Intensity | None = None
    slice_axis: str = "axial"
    mask_values: dict[int, int] | None = None
    split: Split = field(default_factory=Split)
    split_ids: SplitIds | None = None

    def __post_init__(self) -> None:
        for key in ("name", "image_suffix", "mask_suffix"):
            object.__setattr__(self, key, nfc(getattr(self, key)))
        object.__setattr__(self, "classes", tuple(map(nfc, self.classes)))
        # The recipe has the checks of what the two share.
        Recipe(self.name, self.classes, self.channels, 1, Intensity("range", 0, 1), self.slice_axis)
        for key in ("images", "masks"):
            where = getattr(self, key)
            if where is not None and has_control(where):
                raise ConfigError(f"{key}: got {shown(where)}, expected a folder or a pattern, no control characters")
        for value, label in (self.mask_values or {}).items():
            if not 0 <= label < len(self.classes):
                raise ConfigError(f"mask_values.{value}: got {label}, expected 0 to {len(self.classes) - 1}")
        if self.split_ids is not None and self.split != Split():
            raise ConfigError("split_ids: got split as well, expected one of the two")


def read_description(path: str | Path) -> Description:
    """Read and check the YAML file of a data set.

    Raises:
        ConfigError: no such file, not YAML, an unknown key, a wrong type or value; names the file and the key.
    """
    mapping = read_yaml(path)
    try:
        return from_mapping(Description, mapping)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def check_image_size(size: int, key: str = "image_size") -> None:
    """Raise `ConfigError`, which names `key`, for a side [S1] in pixels that the network cannot halve five times."""
    if not 32 <= size <= MAX_IMAGE_SIZE or size % 32:
        raise ConfigError(
            f"{key}: got {shown(size)}, expected a multiple of 32, at least 32 and at most {MAX_IMAGE_SIZE}"
        )
