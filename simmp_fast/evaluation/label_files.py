"""Predictions as files: label maps and probabilities that lie exactly where their image lies."""

from __future__ import annotations

import gzip
import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from simmp_fast.data.errors import disk_errors, reading
from simmp_fast.files import atomic_file


def write_label_map(path: Path, labels: NDArray[np.uint8], source: Path) -> None:
    """Write a label map in the format that `path` names.

    Args:
        path: `.nii`, `.nii.gz` or `.png`; replaced in one step if it exists.
        labels: uint8 class indices, in the axis order of the image's own array.
        source: the image; a NIfTI label map keeps its shape, affine, qform, sform and voxel size.

    Raises:
        DataError: the file cannot be written.
    """
    if path.name.endswith(".png"):
        buffer = io.BytesIO()
        Image.fromarray(labels).save(buffer, format="PNG")
        _write(path, buffer.getvalue())
    else:
        _write_nifti(path, labels, source)


def write_probabilities(path: Path, probabilities: NDArray[np.float32], source: Path) -> None:
    """Write class probabilities, classes last: a 4-D NIfTI file like its image, or an array (`.npy`).

    Args:
        path: `.nii`, `.nii.gz` or `.npy`; replaced in one step if it exists.
        probabilities: float32, the axes of the image's own array, then classes.
        source: the image.

    Raises:
        DataError: the file cannot be written.
    """
    if path.name.endswith(".npy"):
        buffer = io.BytesIO()
        np.save(buffer, probabilities, allow_pickle=False)
        _write(path, buffer.getvalue())
    else:
        _write_nifti(path, probabilities, source)


def _write_nifti(path: Path, array: NDArray[Any], source: Path) -> None:
    """`array` under the header of `source`: its geometry kept, its value type, scaling and display range replaced."""
    import nibabel

    with reading(source):
        image: Any = nibabel.load(source)
    header = image.header.copy()
    header.set_data_dtype(array.dtype)
    header["cal_min"] = header["cal_max"] = 0
    shape = image.shape if array.dtype == np.uint8 else array.shape
    result = type(image)(array.reshape(shape), image.affine, header)
    result.header.set_slope_inter(1, 0)  # after construction, which resets it to NaN
    content = result.to_bytes()
    if path.name.endswith(".gz"):
        content = gzip.compress(content, compresslevel=6, mtime=0)
    _write(path, content)


def _write(path: Path, content: bytes) -> None:
    with disk_errors(path), atomic_file(path) as temporary:
        temporary.write_bytes(content)
