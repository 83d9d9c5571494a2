"""PNG, JPEG and BMP files, and the way to those that are TIFF: what a file holds decides, not its extension."""

from __future__ import annotations

import io
import math
import struct
from pathlib import Path

import numpy as np
from PIL.BmpImagePlugin import BmpImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from simmp_fast.data.errors import DataError
from simmp_fast.data.picture_rules import as_volume, check_size, one_picture
from simmp_fast.data.tiff_files import TIFF_STARTS, read_tiff
from simmp_fast.data.volume import DEFLATE, Array, Volume, check_announced, library, read_content

# Pillow's classes themselves: `Image.open` refuses pictures of more than 179 million pixels. A photo of two views (MPO)
# starts as a JPEG file, and is read as its first picture.
_KINDS: dict[bytes, type[ImageFile]] = {b"\x89PNG": PngImageFile, b"\xff\xd8\xff": JpegImageFile, b"BM": BmpImageFile}
_ORIENTATION = 274


def read_picture(path: Path, label: bool) -> Volume:
    """A picture, upright.

    Args:
        path: the file.
        label: keep the indices of a palette and the numbers of a picture of fewer than 8 bits; take a mask that is
            drawn in the alpha channel from there.

    Returns:
        `[h, w]` or `[h, w, 3]`, in the dtype of the file; 1-bit pictures are bool as labels, 0 and 255 as images.

    Raises:
        DataError: colours, channels or numbers that a network has no use for; the parsers' own errors, otherwise.
    """
    content = read_content(path)
    if content.startswith(TIFF_STARTS):
        return read_tiff(path, content, label)
    kind = next((kind for start, kind in _KINDS.items() if content.startswith(start)), None)
    if kind is None:
        raise DataError(f"{path}: corrupt or truncated file, or of another kind than PNG, JPEG, TIFF or BMP")
    with kind(io.BytesIO(content)) as picture:
        check_size(path, *picture.size)
        if kind in (PngImageFile, BmpImageFile):
            announced = math.prod(picture.size) * _pixel_bits(kind, content, len(picture.getbands())) // 8
            check_announced(path, "its header", announced, len(content), DEFLATE)
        one_picture(path, getattr(picture, "n_frames", 1))
        bits = content[24] if kind is PngImageFile else 8  # in the PNG header, the bits of a channel
        orientation = _orientation(picture)
        if bits == 16:
            array, key = library("imagecodecs", path).png_decode(content), None
            if label and "transparency" in picture.info:  # decoded as an alpha channel
                array = array[..., :-1]
        else:
            array, key, bits = _pillow_array(picture, bits, label, path)
    values, alpha = _parts(array)
    if key is not None:
        alpha = np.where((values == key).all(-1) if values.ndim == 3 else values == key, 0, 255)
    if kind is BmpImageFile and alpha is None:
        alpha = _spare_bytes(content, *picture.size)
    return as_volume(path, values, alpha, 65535 if bits == 16 else 255, orientation, bits, label)


def _pixel_bits(kind: type[ImageFile], content: bytes, bands: int) -> int:
    """Bits of a pixel of a PNG or BMP file, as its header has them."""
    return content[24] * bands if kind is PngImageFile else int.from_bytes(content[28:30], "little")


def _orientation(picture: ImageFile) -> int:
    """The EXIF orientation; 1 where there is none, or where EXIF is too damaged to be read."""
    try:
        orientation: int = picture.getexif().get(_ORIENTATION, 1)
    except (SyntaxError, struct.error):  # the pixels have nothing to do with it
        return 1
    return orientation


def _pillow_array(
    picture: ImageFile, bits: int, label: bool, path: Path
) -> tuple[Array, int | tuple[int, ...] | None, int]:
    """The array of a picture of up to 8 bits a channel, the value that is transparent (if any), and the bits left."""
    mode, key = picture.mode, picture.info.get("transparency")
    if mode == "P":
        return (np.array(picture), None, 8) if label else (np.array(picture.convert("RGBA")), None, 8)
    if mode not in ("1", "L", "LA", "RGB", "RGBA"):
        raise DataError(f"{path}: got a picture in {mode}, expected grey, RGB or a palette")
    array = np.array(picture)
    if mode == "1":
        key = None if key is None else bool(key)
        bits = 1
    elif bits < 8 and mode == "L":
        array = array // (255 // (2**bits - 1))  # Pillow has spread these over 0..255, but not the key
    return array, None if label else key, bits


def _parts(array: Array) -> tuple[Array, Array | None]:
    """Colours `[h, w]` or `[h, w, 3]`, and alpha."""
    if array.ndim == 2:
        return array, None
    colours, alpha = (array[..., :-1], array[..., -1]) if array.shape[-1] in (2, 4) else (array, None)
    return (colours[..., 0] if colours.shape[-1] == 1 else colours), alpha


def _spare_bytes(content: bytes, width: int, height: int) -> Array | None:
    """The fourth bytes of a 32-bit BMP picture: without meaning, but alpha where a program writes it; then they vary.

    None if there are none, or if all are the same.
    """
    header, bits, packing = (int.from_bytes(content[a:b], "little") for a, b in ((14, 18), (28, 30), (30, 34)))
    if header < 40 or bits != 32 or packing != 0:
        return None
    first, rows = int.from_bytes(content[10:14], "little"), int.from_bytes(content[22:26], "little", signed=True)
    spare = np.frombuffer(content, np.uint8, 4 * width * height, first).reshape(height, width, 4)[..., 3]
    if (spare == spare[0, 0]).all():
        return None
    return spare[::-1] if rows > 0 else spare  # most files have the lowest row first
