"""From a file's array to what the network sees, and label maps back: the same for training and for new files.

A case becomes slices `[slices, channels, h, w]` in one canonical orientation, whatever the order and direction of the
axes in its file; intensities are brought to 0..1; slices are resized to the network's square.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from scipy import ndimage

from simmp_fast.bounds import MAX_IMAGE_SIZE
from simmp_fast.config import ConfigError
from simmp_fast.data.errors import DataError
from simmp_fast.data.formats import Array, Volume, grey, library
from simmp_fast.data.names import is_utf8
from simmp_fast.messages import has_control, shown

# The directions in which the indices of (slice, row, column) grow: pictures show the front or the head on top and the
# patient's right on the left, as radiologists look at them.
SLICE_AXES = {"axial": "SPL", "coronal": "AIL", "sagittal": "RIP"}

_SMALLEST, _LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
_LONGEST_NAME = 200  # characters
_NEXT_TO_NOTHING = 0.01  # of 0..1: less contrast is no picture, but values in another unit than the rule's


@dataclass(frozen=True)
class Intensity:
    """How values become 0..1.

    Attributes:
        rule: "range": `low` to `high`, a value outside is an error; "window": `low` to `high`, values outside are
            clipped; "percentile": a window from the `low`-th to the `high`-th percentile of each case.
        low: becomes 0.
        high: becomes 1.

    Raises:
        ConfigError: an unknown rule, or limits that are no interval float32 can hold.
    """

    rule: str
    low: float
    high: float

    def __post_init__(self) -> None:
        if self.rule not in ("range", "window", "percentile"):
            raise ConfigError(f"intensity.rule: got {self.rule!r}, expected 'range', 'window' or 'percentile'")
        for key in ("low", "high"):
            if not abs(getattr(self, key)) <= _LARGEST:  # infinity and NaN are not
                raise ConfigError(f"intensity.{key}: got {getattr(self, key)}, expected a number that float32 holds")
        if not self.low < self.high:
            raise ConfigError(f"intensity.high: got {self.high}, expected a number above intensity.low = {self.low}")
        if not _SMALLEST <= self.high - self.low <= _LARGEST:
            raise ConfigError(
                f"intensity: got {self.low} to {self.high}, expected a difference from {_SMALLEST:g} to {_LARGEST:g}"
            )
        if self.rule == "percentile" and not 0 <= self.low < self.high <= 100:
            raise ConfigError(f"intensity: got percentiles {self.low} and {self.high}, expected 0 to 100")

    def apply(self, volume: Volume) -> Array:
        """The values of one case as float32 in 0..1, in the shape of `volume.array`.

        Raises:
            DataError: a value outside a "range", values of which the network would see next to nothing, percentiles
                that are equal, or values that are NaN or infinite.
        """
        found = float(volume.array.min()), float(volume.array.max())
        if not np.isfinite(found).all():
            raise DataError(f"{volume.path}: got values from {found[0]} to {found[1]}, expected finite numbers")
        low, high = self._percentiles(volume) if self.rule == "percentile" else (self.low, self.high)
        if self.rule == "range" and (found[0] < low or found[1] > high):
            raise DataError(
                f"{volume.path}: got values from {found[0]:g} to {found[1]:g}, expected {low:g} to {high:g}; "
                "set intensity to the range of these images, or to a window or percentiles"
            )
        least, most = np.clip(found, low, high)
        if most - least <= _NEXT_TO_NOTHING * (high - low):
            raise DataError(
                f"{volume.path}: got values from {found[0]:g} to {found[1]:g}, which are nearly one and the same in "
                f"the {self.rule} {low:g} to {high:g}; set intensity to the range of these images"
            )
        scaled = np.empty_like(volume.array, dtype=np.float32)
        by_columns = volume.array.flags.f_contiguous
        source, target = (volume.array.T, scaled.T) if by_columns else (volume.array, scaled)
        for i in range(len(source)):  # in parts: float64 takes much memory
            target[i] = np.clip((source[i].astype(np.float64) - low) / (high - low), 0, 1)
        return scaled

    def _percentiles(self, volume: Volume) -> tuple[float, float]:
        """The values at the percentiles `low` and `high`; in float64, as narrow types overflow between two of them."""
        values = volume.array.astype(np.float64)
        low, high = (float(p) for p in np.percentile(values, (self.low, self.high), overwrite_input=True))
        if high - low < _SMALLEST:
            raise DataError(
                f"{volume.path}: percentiles {self.low} and {self.high} are both {low}: "
                "nearly constant; expected an intensity rule that fits the image"
            )
        return low, high


@dataclass(frozen=True)
class Recipe:
    """What turns a file into the network's input: kept with a cache, and with a trained model for `predict`.

    Attributes:
        name: the data set's name.
        classes: class names in the order of the labels, background first.
        channels: 1 or 3.
        image_size: side of the network's square in pixels [S1].
        intensity: how values become 0..1.
        slice_axis: "axial", "coronal" or "sagittal"; for volumes with an orientation.
    """

    name: str
    classes: tuple[str, ...]
    channels: int
    image_size: int
    intensity: Intensity
    slice_axis: str = "axial"

    def __post_init__(self) -> None:
        if self.channels not in (1, 3):
            raise ConfigError(f"channels: got {self.channels}, expected 1 or 3")
        if not 2 <= len(self.classes) <= 256 or len(set(self.classes)) != len(self.classes):
            got = f"{len(self.classes)} names, {shown(list(self.classes))}"
            raise ConfigError(f"classes: got {got}, expected 2 to 256 different names, background first")
        for key, text in (("name", self.name), *(("classes", text) for text in self.classes)):
            _check_text(key, text)
        if not 1 <= self.image_size <= MAX_IMAGE_SIZE:
            raise ConfigError(f"image_size: got {shown(self.image_size)}, expected 1 to {MAX_IMAGE_SIZE}")
        if self.slice_axis not in SLICE_AXES:
            raise ConfigError(f"slice_axis: got {self.slice_axis!r}, expected one of {', '.join(SLICE_AXES)}")


def _check_text(key: str, text: str) -> None:
    """Refuse a name that tables, pictures and terminals cannot show."""
    if not is_utf8(text):
        raise ConfigError(f"{key}: got {shown(text)}, expected text that UTF-8 can hold")
    if has_control(text):
        raise ConfigError(f"{key}: got {shown(text)}, expected text without control characters")
    if not text.strip() or len(text) > _LONGEST_NAME:
        raise ConfigError(f"{key}: got {shown(text)} ({len(text)} characters), expected 1 to {_LONGEST_NAME}")


@dataclass(frozen=True)
class Geometry:
    """Where a case's slices lie in its file: enough to bring a label map back to the file's own order.

    Attributes:
        shape: size of the file's array without colour.
        order: the file's axis that counts slices, rows and columns.
        flipped: whether slices, rows and columns run against the file's axis.
        spacing: millimetres between slices, rows and columns (1 where the file does not say).
        affine: voxel indices of the file to millimetres, or None.
    """

    shape: tuple[int, ...]
    order: tuple[int, int, int] = (0, 1, 2)
    flipped: tuple[bool, bool, bool] = (False, False, False)
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)
    affine: tuple[tuple[float, ...], ...] | None = field(default=None)

    @property
    def has_spacing(self) -> bool:
        """Whether the file says how large its voxels are."""
        return self.affine is not None

    @property
    def slice_shape(self) -> tuple[int, int, int]:
        """(slices, rows, columns) in canonical order."""
        full = (1,) * (3 - len(self.shape)) + self.shape
        return full[self.order[0]], full[self.order[1]], full[self.order[2]]


def geometry(volume: Volume, slice_axis: str = "axial") -> Geometry:
    """How the canonical slices of `volume` lie in its file; a file without orientation keeps its own order."""
    if volume.affine is None:
        return Geometry(volume.shape)
    orientations = library("nibabel.orientations", volume.path)
    target = orientations.axcodes2ornt(SLICE_AXES[slice_axis])
    # For each axis of the file: which canonical axis it becomes, and with which sign.
    transform = orientations.ornt_transform(orientations.io_orientation(volume.affine), target)
    order = np.argsort(transform[:, 0])
    spacing = np.linalg.norm(volume.affine[:3, :3], axis=0)
    a, b, c = (int(axis) for axis in order)
    return Geometry(
        shape=volume.shape,
        order=(a, b, c),
        flipped=(bool(transform[a, 1] < 0), bool(transform[b, 1] < 0), bool(transform[c, 1] < 0)),
        spacing=(float(spacing[a]), float(spacing[b]), float(spacing[c])),
        affine=tuple(tuple(float(v) for v in row) for row in volume.affine),
    )


def _flip(slices: Array, placed: Geometry) -> Array:
    return slices[tuple(slice(None, None, -1 if flip else 1) for flip in placed.flipped)]


def to_slices(array: Array, placed: Geometry) -> Array:
    """An array in its file's order (colour axis last, if any) as canonical slices.

    Returns:
        `[slices, h, w]`, or `[slices, h, w, 3]` for colour; a view where possible.
    """
    full = array.reshape((1,) * (3 - len(placed.shape)) + array.shape)
    return _flip(full.transpose(*placed.order, *range(3, full.ndim)), placed)


def from_slices(slices: Array, placed: Geometry) -> Array:
    """The inverse of `to_slices`: canonical slices `[slices, h, w]` in the order of the file's own array."""
    if slices.shape[:3] != placed.slice_shape:
        raise ValueError(f"slices: got shape {list(slices.shape)}, expected {list(placed.slice_shape)}")
    back = _flip(slices, placed).transpose(*np.argsort(placed.order), *range(3, slices.ndim))
    return np.ascontiguousarray(back.reshape(placed.shape + slices.shape[3:]))


def resize_image(image: Array, size: int) -> Array:
    """Resize one slice `[C, h, w]` in 0..1 to a square by cubic splines (corners on corners).

    Returns:
        float32 `[C, size, size]`, clipped to 0..1.
    """
    channels, *plane = image.shape
    if tuple(plane) == (size, size):
        return image.astype(np.float32, order="C")
    out = np.empty((channels, size, size), np.float32)
    for source, target in zip(image, out, strict=True):
        # "mirror" equals the default, "constant", but at the far edge, where rounding makes that one read zeros.
        ndimage.zoom(source, (size / plane[0], size / plane[1]), output=target, order=3, mode="mirror")
    return np.clip(out, 0, 1, out=out)


def resize_label(label: Array, shape: tuple[int, int]) -> Array:
    """Resize label maps `[..., h, w]` to `shape`, taking the nearest pixel (corners on corners, as `resize_image`)."""
    rows, columns = (_nearest(source, target) for source, target in zip(label.shape[-2:], shape, strict=True))
    return np.ascontiguousarray(label[..., rows[:, None], columns])


def _nearest(source: int, target: int) -> Array:
    step = (source - 1) / (target - 1) if target > 1 else 0.0
    nearest: Array = np.floor(np.arange(target) * step + 0.5).astype(np.intp)
    return nearest


def normalised_slices(volume: Volume, recipe: Recipe) -> tuple[Array, Geometry]:
    """One file's slices at native size.

    Returns:
        images float32 `[slices, channels, h, w]` in 0..1 in canonical order, and where they lie in the file.

    Raises:
        DataError: a colour picture where one channel is needed, or values that the intensity rule refuses.
    """
    if recipe.channels == 1:
        volume = grey(volume)
    placed = geometry(volume, recipe.slice_axis)
    slices = to_slices(recipe.intensity.apply(volume), placed)
    if not volume.colour:  # grey: the same values in every channel
        return np.broadcast_to(slices[:, None], (len(slices), recipe.channels, *slices.shape[1:])), placed
    return slices.transpose(0, 3, 1, 2), placed


def network_input(volume: Volume, recipe: Recipe) -> tuple[Array, Geometry]:
    """What the network sees of one file: `normalised_slices`, resized to float32 `[slices, channels, S1, S1]`.

    Raises:
        DataError: as `normalised_slices`.
    """
    slices, placed = normalised_slices(volume, recipe)
    return np.stack([resize_image(plane, recipe.image_size) for plane in slices]), placed
