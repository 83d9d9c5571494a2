"""TIFF files: one picture at full depth, whatever the file's layout, compression and byte order."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from simmp_fast.data.errors import DataError
from simmp_fast.data.picture_rules import as_volume, check_size, one_picture
from simmp_fast.data.volume import DEFLATE, Array, Volume, check_announced, library, noting

TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_ORIENTATION = 274
_NODATA = 42113  # GDAL's: the value of missing pixels, as text
_NONE, _JPEG, _DEFLATE, _OLD_DEFLATE = 1, 7, 8, 32946
_COLOURS = {"MINISWHITE": 1, "MINISBLACK": 1, "PALETTE": 1, "RGB": 3, "YCBCR": 3}  # and how many samples they have
_ALPHA = ("ASSOCALPHA", "UNASSALPHA")


def read_tiff(path: Path, content: bytes, label: bool) -> Volume:
    """The picture in a TIFF file; arguments, values and errors as `picture_files.read_picture`."""
    tifffile = library("tifffile", path)
    with noting(path, "tifffile"), tifffile.TiffFile(io.BytesIO(content)) as file:
        page = _page(file, path)
        check_size(path, page.imagewidth, page.imagelength * page.imagedepth)
        base = _check(page, path)
        _check_segments(page, len(content), path)
        _check_announced(page, len(content), path)
        array, bits = _samples_last(page), page.bitspersample
        alpha = array[..., base] if page.samplesperpixel > base else None
        values = array[..., 0] if base == 1 else array[..., :base]
        if not label:
            _check_missing(page, values, path)
        opaque = 1.0 if array.dtype.kind == "f" else 2 ** (bits - (array.dtype.kind == "i")) - 1
        colours = _name(page.photometric)
        if colours == "MINISWHITE":
            values = ~values if values.dtype == bool else (2**bits - 1) - values
        elif colours == "PALETTE" and not label:
            values, bits = _palette(page.colormap)[values], 8
        # A broken tag is no number.
        orientation = page.tags.valueof(_ORIENTATION, default=1)
    return as_volume(path, values, alpha, opaque, orientation, bits, label)


def _page(file: Any, path: Path) -> Any:
    """The file's one picture; smaller copies of it (thumbnails, pyramids) do not count."""
    pages: list[Any] = []
    for page in _chain(file.pages, path):
        pages += [page, *(_chain(page.pages, path) if page.subifds else ())]
    full = [page for page in pages if not page.is_reduced] or pages
    one_picture(path, len(full))
    # Some writers describe a whole stack behind its first page.
    described = max((series.size for series in file.series), default=0)
    size = math.prod(full[0].shape)
    if described > size:
        one_picture(path, described // size)
    return full[0]


def _chain(pages: Iterable[Any], path: Path) -> Iterator[Any]:
    """The pages that point to one another; damaged ones can point back, without end."""
    seen = set()
    for page in pages:
        if page.offset in seen:
            raise DataError(f"{path}: corrupt or truncated file (its pages point in a circle)")
        seen.add(page.offset)
        yield page


def _name(value: Any) -> str:
    """The name of a tag's value, or its number where the standard has none."""
    return getattr(value, "name", str(value))


def _check(page: Any, path: Path) -> int:
    """Refuse what is no grey or colour picture with or without alpha; returns the number of its colour samples."""
    colours = _name(page.photometric)
    base = _COLOURS.get(colours)
    # JPEG's own decoder makes RGB of YCbCr; nothing does without it.
    if base is None or (colours == "YCBCR" and page.compression != _JPEG):
        raise DataError(f"{path}: got a picture in {colours}, expected grey, RGB or a palette")
    if page.imagedepth != 1:
        raise DataError(f"{path}: got {page.imagedepth} planes, expected one picture in a file")
    extra = [_name(sample) for sample in page.extrasamples]
    if page.samplesperpixel != base and not (page.samplesperpixel == base + 1 and extra in ([a] for a in _ALPHA)):
        raise DataError(
            f"{path}: got {page.samplesperpixel} channels ({colours}{''.join(f', {name}' for name in extra)}), "
            f"expected {base}, or {base} and alpha"
        )
    if page.dtype is None or not isinstance(page.bitspersample, int):
        raise DataError(f"{path}: got values of {page.bitspersample} bits, expected integers or floats of equal bits")
    whole = page.dtype.kind in "bu"
    if not whole and colours in ("MINISWHITE", "PALETTE"):
        raise DataError(f"{path}: got {colours} with values of type {page.dtype}, expected unsigned integers")
    return base


def _check_segments(page: Any, size: int, path: Path) -> None:
    """Refuse a file that lacks some of its strips or tiles, which would be read as zeros or as whatever was there."""
    need = math.prod(page.chunked)
    segments = list(zip(page.dataoffsets, page.databytecounts, strict=False))
    good = sum(1 for offset, count in segments if offset > 0 and count > 0 and offset + count <= size)
    if good < need or good < len(segments):
        raise DataError(f"{path}: corrupt or truncated file ({good} of {need} strips or tiles are there)")


def _check_announced(page: Any, size: int, path: Path) -> None:
    """Refuse a picture that its `size` bytes cannot hold, or of strips or tiles that memory cannot."""
    fold = {_NONE: 1, _DEFLATE: DEFLATE, _OLD_DEFLATE: DEFLATE}.get(int(page.compression))
    packed = page.imagewidth * page.imagelength * page.samplesperpixel * page.bitspersample // 8
    if fold is not None:
        check_announced(path, "its header", packed, size, fold)
    check_announced(path, "its header", math.prod(page.chunked) * math.prod(page.chunks) * page.dtype.itemsize)


def _check_missing(page: Any, values: Array, path: Path) -> None:
    """Refuse an image with pixels that it calls missing."""
    try:
        mark = float(page.tags.valueof(_NODATA, default="nan"))
    except (TypeError, ValueError):
        return
    if missing := int((values == mark).sum()):
        raise DataError(f"{path}: {missing} values are missing (GDAL_NODATA = {mark:g}), expected all")


def _samples_last(page: Any) -> Array:
    """The page's values `[h, w, samples]`."""
    array: Array = page.asarray()
    if page.samplesperpixel == 1:
        return array.reshape(page.imagelength, page.imagewidth, 1)
    return np.moveaxis(array, 0, -1) if page.axes.startswith("S") else array


def _palette(colormap: Array) -> Array:
    """The colours of a palette `[entries, 3]`: uint8 unless they have more than 8 bits, uint16 then."""
    high, low = colormap >> 8, colormap & 255
    if (colormap < 256).all():  # from writers that took the 16-bit entries for 8-bit ones
        high = low
    elif not ((low == 0).all() or (low == high).all()):
        return colormap.T
    return high.astype(np.uint8).T
