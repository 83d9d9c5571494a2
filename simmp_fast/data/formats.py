"""Image files: NIfTI, PNG, JPEG, TIFF, BMP, npz and HDF5, read with checks.

Every file that cannot be used is a `DataError` that names it. nibabel, h5py, tifffile and imagecodecs are imported only
when a file needs them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from simmp_fast.data.array_files import read_arrays
from simmp_fast.data.errors import DataError
from simmp_fast.data.names import CONTROL
from simmp_fast.data.nifti_files import read_nifti, write_nifti
from simmp_fast.data.picture_files import read_picture
from simmp_fast.data.volume import Array, Volume, library
from simmp_fast.messages import escaped, has_control, one_line, why_no_file

__all__ = [
    "ARRAYS", "EXTENSIONS", "NIFTI", "PICTURES", "Array", "Volume", "extension", "grey", "library", "read_image",
    "read_label", "stem", "write_nifti",
]  # fmt: skip

NIFTI = (".nii", ".nii.gz")
PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
ARRAYS = (".npz", ".h5", ".hdf5")
EXTENSIONS = NIFTI + PICTURES + ARRAYS

_LARGEST = float(np.finfo(np.float32).max)
_LARGEST_WHOLE = 2**53  # above, float64 has not all whole numbers


def extension(path: str | Path) -> str:
    """The extension of a supported file in lower case (``".nii.gz"``), or ``""`` for another kind of file."""
    name = Path(path).name.lower()
    return max((e for e in EXTENSIONS if name.endswith(e)), key=len, default="")


def stem(path: str | Path) -> str:
    """The file's name without its extension."""
    name = Path(path).name
    return name[: len(name) - len(extension(path))]


def read_image(path: str | Path, *, header_spacing: bool = False) -> Volume:
    """Read an image or a volume; of an npz or HDF5 file, its `image` (or `img`).

    Values keep their dtype, but bool becomes uint8, and float64 becomes float32 where that changes none of them.

    Args:
        path: the file.
        header_spacing: of a NIfTI file, take the voxel size of its header where its affine says another, wrongly.

    Raises:
        DataError: missing, of an unknown kind, corrupt, truncated, empty, constant, transparent, or holding NaN,
            infinity or numbers too large to compute with.
    """
    volume = _read(Path(path), "image", header_spacing)
    array = volume.array
    if array.dtype == bool:
        array = array.astype(np.uint8)
    lowest, highest = array.min(), array.max()
    if lowest == highest:
        raise DataError(f"{path}: a constant image (every value is {lowest}), expected a picture of something")
    _check_size_of_values(array, lowest, highest, Path(path))
    if array.dtype.kind == "f" and array.dtype.itemsize > 4:
        array = array.astype(np.float64)
        single = array.astype(np.float32)
        array = single if np.array_equal(single, array) else array
    return Volume(array, volume.affine, volume.path, volume.colour)


def read_label(path: str | Path, *, header_spacing: bool = False) -> Volume:
    """Read a label map of whole numbers, int64; of an npz or HDF5 file, its `label`.

    Of a colour picture with three equal channels one is taken; a palette picture gives its indices, and a picture that
    is drawn in its alpha channel the values of that.

    Args:
        path: the file.
        header_spacing: as of `read_image`.

    Raises:
        DataError: missing, of an unknown kind, corrupt, truncated, in colour, or with values that are not whole or
            beyond int64.
    """
    volume = _read(Path(path), "label", header_spacing)
    array = grey(volume).array
    limits = np.iinfo(np.int64)
    for value in (array.min(), array.max()):
        if not limits.min <= int(value) <= limits.max:
            raise DataError(f"{path}: got label {value}, expected numbers of 64 bits")
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


def _check_size_of_values(array: Array, lowest: float, highest: float, path: Path) -> None:
    """Refuse numbers that float64 cannot compute with exactly enough; most often they stand for missing data."""
    limit = _LARGEST if array.dtype.kind == "f" else _LARGEST_WHOLE
    value = lowest if abs(int(lowest)) > abs(int(highest)) else highest
    if abs(int(value)) > limit:
        raise DataError(
            f"{path}: got the value {value}, expected at most {limit:g} on either side of 0; does it mark missing data?"
        )


@contextlib.contextmanager
def _parsing(path: Path) -> Iterator[None]:
    """Parsers meet corrupt bytes with every kind of exception: each becomes a `DataError` that names the file."""
    try:
        yield
    except (DataError, MemoryError):
        raise
    except PermissionError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    except Exception as error:
        reason = one_line(str(error) or type(error).__name__)
        raise DataError(f"{path}: corrupt or truncated file ({reason})") from error


def _read(path: Path, key: str, header_spacing: bool) -> Volume:
    """The array in a file, of any kind and in native byte order, with the checks that images and labels share."""
    kind = extension(path)
    if has_control(str(path)):
        raise DataError(f"{escaped(str(path))}: {CONTROL}")
    if why := why_no_file(path):
        raise DataError(f"{path}: {why}")
    if not kind:
        raise DataError(f"{path}: unknown kind of file, expected one of {', '.join(EXTENSIONS)}")
    with _parsing(path):
        if kind in NIFTI:
            volume = read_nifti(path, key == "label", header_spacing)
        elif kind in PICTURES:
            volume = read_picture(path, key == "label")
        else:
            volume = read_arrays(path, key)
    array = volume.array
    if array.dtype.kind not in "buif":
        raise DataError(f"{path}: got values of type {array.dtype}, expected numbers")
    if array.size == 0:
        raise DataError(f"{path}: got an empty array of shape {list(array.shape)}")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise DataError(f"{path}: {int((~np.isfinite(array)).sum())} values are NaN or infinite")
    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    return Volume(native, volume.affine, volume.path, volume.colour)
