"""NIfTI files: volumes with their place in space, in millimetres."""

from __future__ import annotations

import gzip
import math
from pathlib import Path
from typing import Any

import numpy as np

from simmp_fast.data.errors import DataError, disk_errors
from simmp_fast.data.volume import DEFLATE, Array, Volume, check_announced, library, noting
from simmp_fast.files import atomic_file

_NIFTI2 = (b"\x1c\x02\x00\x00", b"\x00\x00\x02\x1c")  # the header's own size, 540
_HEADER = 540  # bytes of the longer one
_SPARE = 2**20  # bytes that may follow the voxels, without meaning
_MILLIMETRES = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}  # unknown, metres, millimetres, microns
_TOLERANCE = 0.01  # by which the voxel size of header and affine may differ


def read_nifti(path: Path, label: bool, header_spacing: bool) -> Volume:
    """A volume `[x, y, z]` and its affine in millimetres; a file that names no unit has millimetres.

    Args:
        path: the file, NIfTI-1 or NIfTI-2.
        label: whether it is read as a label map: its affine alone counts, as it is compared with that of the image.
        header_spacing: where the voxel size in the header (`pixdim`) differs from that of the affine, take it.

    Raises:
        DataError: not three axes, colour, an affine that cannot be inverted, or an image with two voxel sizes that
            contradict each other.
    """
    nibabel = library("nibabel", path)
    kind, header, content = _content(nibabel, path)
    sides, unit = _sides(header, path), _unit(header, path)
    with noting(path, "nibabel.global"):
        image = kind.from_bytes(content)
    array, affine = np.asanyarray(image.dataobj), np.asarray(image.affine, np.float64).copy()
    if array.dtype.names:
        raise DataError(f"{path}: got {len(array.dtype)} values a voxel (colour), expected one")
    while array.ndim > 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3:
        raise DataError(f"{path}: got an array of shape {list(array.shape)}, expected three axes")
    affine[:3] *= unit
    _check_invertible(affine, path)
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    stated = np.array([*(sides * unit), *lengths[len(sides) :]])
    if header_spacing:
        affine = affine @ np.diag([*(stated / lengths), 1])
    elif not label and not np.allclose(stated, lengths, rtol=_TOLERANCE, atol=0):
        raise DataError(
            f"{path}: got voxels of {_listed(lengths)} mm from its affine, but {_listed(stated)} mm in its header "
            "(pixdim), expected the same; write the right size to both"
        )
    return Volume(array, affine, path)


def write_nifti(path: str | Path, array: Array, affine: Array) -> None:
    """Write `array` [x, y, z] as NIfTI-1 (`.nii` or `.nii.gz`), atomically; equal input gives equal bytes.

    Raises:
        DataError: another extension, nibabel is missing, or the file cannot be written.
    """
    name = Path(path).name.lower()
    if not name.endswith((".nii", ".nii.gz")):
        raise DataError(f"{path}: got extension {Path(path).suffix!r}, expected .nii or .nii.gz")
    nibabel = library("nibabel", path)
    image = nibabel.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm")
    content = image.to_bytes()
    if name.endswith(".gz"):
        content = gzip.compress(content, compresslevel=6, mtime=0)
    with disk_errors(path), atomic_file(path) as temporary:
        temporary.write_bytes(content)


def _content(nibabel: Any, path: Path) -> tuple[Any, Any, bytes]:
    """The kind of image, its header unchecked, and all bytes of the file, unpacked: as many as the header announces.

    Of nibabel's own checks none is wanted here: they replace sides that are no lengths.
    """
    size = path.stat().st_size
    packed = path.name.lower().endswith(".gz")
    with gzip.open(path) if packed else open(path, "rb") as file:
        start = file.read(_HEADER)
        kind = nibabel.Nifti2Image if start[:4] in _NIFTI2 else nibabel.Nifti1Image
        header = kind.header_class(start[: kind.header_class.sizeof_hdr], check=False)
        need = _announced(header, size, packed, path)
        content = start + file.read(max(0, need - len(start)))
        # Only at its end does gzip compare the checksum.
        if packed and len(file.read(_SPARE)) == _SPARE:
            raise DataError(f"{path}: got over {need + _SPARE} bytes, expected {need} as its header says")
    if len(content) < need:
        got = f"got {len(content)} bytes, expected {need} as its header says"
        raise DataError(f"{path}: corrupt or truncated file ({got})")
    return kind, header, content


def _announced(header: Any, size: int, packed: bool, path: Path) -> int:
    """How many bytes the header says there are, if that many can be there and be worked with.

    Its voxels lie neither in the header itself nor beyond the end of the file.
    """
    if (length := int(header["sizeof_hdr"])) != header.sizeof_hdr:
        raise DataError(f"{path}: corrupt or truncated file (a header of {length} bytes, expected {header.sizeof_hdr})")
    start, shape = int(header["vox_offset"]), [int(side) for side in header.get_data_shape()]
    if start < header.sizeof_hdr:
        raise DataError(
            f"{path}: got voxels from byte {start} on (vox_offset), expected them behind the header of "
            f"{header.sizeof_hdr} bytes; is it one of a pair of files (hdr and img)?"
        )
    if any(side < 0 for side in shape):
        raise DataError(f"{path}: got an array of shape {shape}, expected sides of at least 0")
    need = start + math.prod(shape) * header.get_data_dtype().itemsize
    if not packed and need > size:
        raise DataError(f"{path}: corrupt or truncated file (got {size} bytes, expected {need} as its header says)")
    check_announced(path, "its header", need, size, DEFLATE)
    scaled = header.get_slope_inter()[0] not in (None, 1)
    check_announced(path, "its header", math.prod(shape) * 8 if scaled else need)
    return need


def _sides(header: Any, path: Path) -> Array:
    """The header's voxel size in its own unit, float64 [axes], of up to three axes that the array has."""
    axes = min(3, int(header["dim"][0]))
    sides = np.asarray(header["pixdim"][1 : 1 + axes], np.float64)
    if not (np.isfinite(sides) & (sides > 0)).all():
        raise DataError(f"{path}: got voxels of {_listed(sides)} in pixdim, expected sides above 0")
    return sides


def _unit(header: Any, path: Path) -> float:
    """How many millimetres the file's unit of length has."""
    code = int(header["xyzt_units"]) % 8
    if code not in _MILLIMETRES:
        raise DataError(f"{path}: got the unit of length {code} in xyzt_units, expected 1 (m), 2 (mm) or 3 (micron)")
    return _MILLIMETRES[code]


def _check_invertible(affine: Array, path: Path) -> None:
    with np.errstate(over="ignore"):  # a length is then infinite, its direction 0 and the determinant too
        lengths = np.linalg.norm(affine[:3, :3], axis=0)
    # Of the directions alone: small voxels have small determinants.
    if not np.isfinite(affine).all() or not lengths.all() or abs(np.linalg.det(affine[:3, :3] / lengths)) < 1e-6:
        raise DataError(f"{path}: its affine cannot be inverted: {affine.tolist()}")


def _listed(values: Array) -> str:
    return " x ".join(f"{value:.6g}" for value in values)
