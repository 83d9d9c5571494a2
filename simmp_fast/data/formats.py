"""Image files: NIfTI, PNG, JPEG, TIFF, BMP, npz and HDF5, read with checks, and NIfTI written.

Every file that cannot be used is a `DataError` that names it. nibabel and h5py are imported only when a file needs
them.
"""

from __future__ import annotations

import contextlib
import gzip
import importlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from simmp_fast.data.errors import DataError
from simmp_fast.data.files import atomic_file, disk_errors

Array = npt.NDArray[Any]

NIFTI = (".nii", ".nii.gz")
PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
ARRAYS = (".npz", ".h5", ".hdf5")
EXTENSIONS = NIFTI + PICTURES + ARRAYS

# What npz and HDF5 files in circulation call an image and a label.
_ARRAY_NAMES = {"image": ("image", "img"), "label": ("label",)}

# Picture modes of Pillow whose array is the values themselves: 1-bit, grey of 8, 16 and 32 bits, float, colour.
_PLAIN_MODES = ("1", "L", "I;16", "I;16B", "I;16L", "I", "F", "RGB")


@dataclass(frozen=True)
class Volume:
    """An image, a volume or a label map as its file holds it.

    Attributes:
        array: NIfTI `[x, y, z]`, picture `[h, w]`, stack `[d, h, w]`; a colour image has a last axis of 3.
        affine: float64 `[4, 4]`, voxel indices to millimetres (NIfTI), or None.
        path: the file.
        colour: whether the last axis of `array` is colour.
    """

    array: Array
    affine: Array | None
    path: Path
    colour: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The size of `array` without colour."""
        return self.array.shape[:-1] if self.colour else self.array.shape


def extension(path: str | Path) -> str:
    """The extension of a supported file in lower case (``".nii.gz"``), or ``""`` for another kind of file."""
    name = Path(path).name.lower()
    return max((e for e in EXTENSIONS if name.endswith(e)), key=len, default="")


def stem(path: str | Path) -> str:
    """The file's name without its extension."""
    name = Path(path).name
    return name[: len(name) - len(extension(path))]


def read_image(path: str | Path) -> Volume:
    """Read an image or a volume; of an npz or HDF5 file, its `image` (or `img`).

    Values keep their dtype, but float64 becomes float32.

    Raises:
        DataError: missing, of an unknown kind, corrupt, truncated, empty, constant, or holding NaN or infinity.
    """
    volume = _read(Path(path), "image")
    array = volume.array
    if array.dtype == bool:  # a 1-bit picture: black and white, not 0 and 1
        array = array.astype(np.uint8) * np.uint8(255)
    elif array.dtype == np.float64:
        array = array.astype(np.float32)
    if array.min() == array.max():
        raise DataError(f"{path}: a constant image (every value is {array.flat[0]}), expected a picture of something")
    return Volume(array, volume.affine, volume.path, volume.colour)


def read_label(path: str | Path) -> Volume:
    """Read a label map of whole numbers, int64; of an npz or HDF5 file, its `label`.

    Of a colour picture with three equal channels one is taken; a palette picture gives its indices.

    Raises:
        DataError: missing, of an unknown kind, corrupt, truncated, in colour, or with values that are not whole.
    """
    volume = _read(Path(path), "label")
    array = grey(volume).array
    label = array.astype(np.int64)
    if array.dtype.kind == "f" and not np.array_equal(label, array):
        raise DataError(f"{path}: got label {array[label != array].flat[0]}, expected whole numbers")
    return Volume(label, volume.affine, volume.path)


def grey(volume: Volume) -> Volume:
    """`volume` with one channel.

    Raises:
        DataError: a colour picture whose channels differ.
    """
    if not volume.colour:
        return volume
    first = volume.array[..., 0]
    if not (volume.array == first[..., None]).all():
        raise DataError(f"{volume.path}: got a colour picture, expected one channel (or three equal ones)")
    return Volume(first, volume.affine, volume.path)


def write_nifti(path: str | Path, array: Array, affine: Array) -> None:
    """Write `array` [x, y, z] as NIfTI-1 (`.nii` or `.nii.gz`), atomically; equal input gives equal bytes.

    Raises:
        DataError: another extension, nibabel is missing, or the file cannot be written.
    """
    if extension(path) not in NIFTI:
        raise DataError(f"{path}: got extension {Path(path).suffix!r}, expected .nii or .nii.gz")
    nibabel = library("nibabel", path)
    image = nibabel.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm")
    content = image.to_bytes()
    if extension(path) == ".nii.gz":
        content = gzip.compress(content, compresslevel=6, mtime=0)
    with disk_errors(path), atomic_file(path) as temporary:
        temporary.write_bytes(content)


def library(name: str, path: str | Path) -> Any:
    """Import an optional module that the file `path` needs; a `DataError` says what to install if it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.partition(".")[0]
        raise DataError(f"{path}: this kind of file needs {package}: pip install {package}") from None


@contextlib.contextmanager
def _parsing(path: Path) -> Iterator[None]:
    """Parsers meet corrupt bytes with every kind of exception: each becomes a `DataError` that names the file."""
    try:
        yield
    except (DataError, MemoryError):
        raise
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise DataError(f"{path}: corrupt or truncated file ({reason})") from error


def _read(path: Path, key: str) -> Volume:
    """The array in a file, of any kind, with the checks that images and labels share."""
    kind = extension(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if not kind:
        raise DataError(f"{path}: unknown kind of file, expected one of {', '.join(EXTENSIONS)}")
    with _parsing(path):
        if kind in NIFTI:
            volume = _read_nifti(path)
        elif kind in PICTURES:
            volume = _read_picture(path, palette=key == "label")
        else:
            volume = _read_arrays(path, kind, key)
    array = volume.array
    if array.dtype.kind not in "buif":
        raise DataError(f"{path}: got values of type {array.dtype}, expected numbers")
    if array.size == 0:
        raise DataError(f"{path}: got an empty array of shape {list(array.shape)}")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise DataError(f"{path}: {int((~np.isfinite(array)).sum())} values are NaN or infinite")
    return volume


def _read_nifti(path: Path) -> Volume:
    nibabel = library("nibabel", path)
    content = path.read_bytes()
    if extension(path) == ".nii.gz":
        # All of it, to the end: only there does gzip compare the checksum.
        content = gzip.decompress(content)
    nifti2 = content[:4] in (b"\x1c\x02\x00\x00", b"\x00\x00\x02\x1c")  # the header's own size, 540
    image = (nibabel.Nifti2Image if nifti2 else nibabel.Nifti1Image).from_bytes(content)
    array, affine = np.asanyarray(image.dataobj), np.asarray(image.affine, np.float64)
    while array.ndim > 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3:
        raise DataError(f"{path}: got an array of shape {list(array.shape)}, expected three axes")
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-12:
        raise DataError(f"{path}: its affine cannot be inverted: {affine.tolist()}")
    return Volume(array, affine, path)


def _read_picture(path: Path, palette: bool) -> Volume:
    """A picture; `palette` keeps the indices of a palette picture instead of its colours."""
    with Image.open(io.BytesIO(path.read_bytes())) as picture:
        frames = getattr(picture, "n_frames", 1)
        if frames != 1:
            raise DataError(f"{path}: got {frames} frames, expected one picture in a file")
        if picture.mode in _PLAIN_MODES or (palette and picture.mode == "P"):
            array = np.array(picture)
        else:  # without transparency, and colours written out
            array = np.array(picture.convert("L" if picture.mode == "LA" else "RGB"))
    return Volume(array, None, path, colour=array.ndim == 3)


def _read_arrays(path: Path, kind: str, key: str) -> Volume:
    if kind == ".npz":
        with np.load(path, allow_pickle=False) as content:
            array = _entry(content, key, path)
    else:
        with library("h5py", path).File(path, "r") as content:
            array = _entry(content, key, path)
    colour = key == "image" and array.ndim in (3, 4) and array.shape[-1] == 3
    if array.ndim - colour not in (2, 3):
        raise DataError(f"{path}: got {key} of shape {list(array.shape)}, expected [h, w] or [d, h, w]")
    return Volume(array, None, path, colour)


def _entry(content: Any, key: str, path: Path) -> Array:
    names = _ARRAY_NAMES[key]
    name = next((n for n in names if n in content), None)
    if name is None:
        need = " or ".join(map(repr, names))
        raise DataError(f"{path}: no array {need} in the file, got {', '.join(content) or 'none'}")
    return np.asarray(content[name][()])
