"""NIfTI files: volumes with their place in space, in millimetres."""

from __future__ import annotations

import gzip
import math
from pathlib import Path
from typing import Any

import numpy as np

from simmp_fast.data.errors import DataError, disk_errors
from simmp_fast.data.volume import Array, Volume, library
from simmp_fast.files import atomic_file

_NIFTI2 = (b"\x1c\x02\x00\x00", b"\x00\x00\x02\x1c")  # the header's own size, 540
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
    content = path.read_bytes()
    if path.name.lower().endswith(".gz"):
        # All of it, to the end: only there does gzip compare the checksum.
        content = gzip.decompress(content)
    kind = nibabel.Nifti2Image if content[:4] in _NIFTI2 else nibabel.Nifti1Image
    image = kind.from_bytes(content)
    # Once more, unchecked: nibabel's checks replace sides that are no lengths.
    header = kind.header_class(content[: kind.header_class.sizeof_hdr], check=False)
    _check_data(header, len(content), path)
    sides, unit = _sides(header, path), _unit(header, path)
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


def _check_data(header: Any, size: int, path: Path) -> None:
    """Refuse a header whose voxels would lie in the header itself, or beyond the end of the file."""
    start, shape = int(header["vox_offset"]), header.get_data_shape()
    if start < header.sizeof_hdr:
        raise DataError(
            f"{path}: got voxels from byte {start} on (vox_offset), expected them behind the header of "
            f"{header.sizeof_hdr} bytes; is it one of a pair of files (hdr and img)?"
        )
    end = start + math.prod(map(int, shape)) * header.get_data_dtype().itemsize
    if end > size:
        raise DataError(f"{path}: corrupt or truncated file (got {size} bytes, expected {end} as its header says)")


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
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    # Of the directions alone: small voxels have small determinants.
    if not np.isfinite(affine).all() or not lengths.all() or abs(np.linalg.det(affine[:3, :3] / lengths)) < 1e-6:
        raise DataError(f"{path}: its affine cannot be inverted: {affine.tolist()}")


def _listed(values: Array) -> str:
    return " x ".join(f"{value:.6g}" for value in values)
