"""Arrays in HDF5 files: those that lie in the file itself, wholly, as plain numbers."""

from __future__ import annotations

import math
import posixpath
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from simmp_fast.data.errors import DataError
from simmp_fast.data.volume import DEFLATE, Array, check_announced, check_type, library

# What netCDF writes beside an array whose values are not what they seem.
_MISSING, _PACKED = ("_FillValue", "missing_value"), {"scale_factor": 1, "add_offset": 0}
_HOPS = 16  # soft links on the way to one array
# Filters whose output is bounded: deflate, shuffle, fletcher32, and lzf, by far less than deflate.
_DEFLATES, _KEEPS_SIZE = (1, 32000), (2, 3)
_LARGE_CHUNK = 2**20  # bytes, packed
_CHECKSUM = 4  # bytes of fletcher32, which may stand before compression


def hdf5_array(content: Any, name: str, path: Path) -> Array:
    """The array `name` of an open HDF5 file.

    Raises:
        DataError: it lies in another file (by a link, as virtual or as external storage), is no array of numbers, was
            not written to the end, is packed, has missing values, is compressed by a plugin, or announces more bytes
            than it can have.
    """
    dataset = content[_place(content, name, path)]
    if not isinstance(dataset, library("h5py", path).Dataset):
        raise DataError(f"{path}: got a {type(dataset).__name__.lower()} {name!r}, expected an array")
    _check_own(dataset, name, path)
    check_type(dataset.dtype, name, path)
    _check_stored(dataset, name, path)
    array = np.asarray(dataset[()])
    packed = [key for key, plain in _PACKED.items() if (np.asarray(dataset.attrs.get(key, plain)) != plain).any()]
    if array.dtype.kind == "i" and str(dataset.attrs.get("_Unsigned", "false")).lower() == "true":
        packed.append("_Unsigned")
    if packed:
        raise DataError(f"{path}: got a packed array {name!r} ({', '.join(packed)}), expected its true values")
    for key in _MISSING:
        if key in dataset.attrs and (missing := int(np.isin(array, dataset.attrs[key]).sum())):
            value = np.ravel(dataset.attrs[key])[0]
            raise DataError(f"{path}: {missing} values of {name!r} are missing ({key} = {value}), expected all")
    return array


def _place(content: Any, name: str, path: Path) -> str:
    """Where in the file the object `name` is, soft links followed.

    HDF5 itself follows links into any other file of the machine, and waits for ever at a pipe.
    """
    h5py = library("h5py", path)
    place, parts, hops = "/", [name], 0
    while parts:
        part = parts.pop(0)
        link = content[place].get(part, getlink=True)
        if isinstance(link, h5py.ExternalLink):
            raise DataError(
                f"{path}: got {name!r} as a link to {link.path!r} in another file, {link.filename!r}, expected the "
                "array itself"
            )
        if isinstance(link, h5py.SoftLink):
            hops += 1
            if hops > _HOPS:
                raise DataError(f"{path}: got {name!r} as a link to {link.path!r}, which leads in a circle")
            place = "/" if link.path.startswith("/") else place
            parts = [step for step in link.path.split("/") if step not in ("", ".")] + parts
        elif link is None:
            raise DataError(f"{path}: got {name!r} as a link to {posixpath.join(place, part)!r}, which is not there")
        else:
            place = posixpath.join(place, part)
    return place


def _check_own(dataset: Any, name: str, path: Path) -> None:
    """Refuse values that lie in other files."""
    if dataset.is_virtual:
        files = ", ".join(sorted({repr(source.file_name) for source in dataset.virtual_sources()})[:3])
        raise DataError(
            f"{path}: got a virtual array {name!r}, made of others ({files}), expected one that has its own values"
        )
    if dataset.external:
        raise DataError(
            f"{path}: got an array {name!r} whose values lie in another file, {dataset.external[0][0]!r}, expected "
            "one that has its own values"
        )


def _check_stored(dataset: Any, name: str, path: Path) -> None:
    """Refuse an array of which HDF5 would make up values, or whose size is not to be believed."""
    size, fold = dataset.dtype.itemsize, 1
    if dataset.chunks:
        need = math.prod(-(-side // chunk) for side, chunk in zip(dataset.shape, dataset.chunks, strict=True))
        there = dataset.id.get_num_chunks()
        announced = need * math.prod(dataset.chunks) * size
        fold = _fold(dataset, name, path)
    else:
        need, there = 1, int(dataset.id.get_storage_size() > 0)
        announced = math.prod(dataset.shape) * size
    if dataset.size and there < need:
        raise DataError(f"{path}: got an array {name!r} of which {need - there} of {need} parts were never written")
    stored = min(dataset.id.get_storage_size(), path.stat().st_size)
    check_announced(path, repr(name), announced if dataset.size else 0, stored if fold else None, fold)
    if fold == DEFLATE and dataset.compression == "gzip":
        _check_chunks(dataset, math.prod(dataset.chunks) * size, name, path)


def _check_chunks(dataset: Any, size: int, name: str, path: Path) -> None:
    """Refuse chunks that go on behind their `size` bytes: HDF5 unpacks each to its end, wherever that is.

    Only those are looked into of which that could take much memory.
    """
    large: list[tuple[int, ...]] = []
    dataset.id.chunk_iter(lambda chunk: large.append(chunk.chunk_offset) if chunk.size > _LARGE_CHUNK else None)
    for offset in large:
        skipped, packed = dataset.id.read_direct_chunk(offset)
        unpacker = zlib.decompressobj()
        if not skipped and len(unpacker.decompress(packed, size + _CHECKSUM + 1)) > size + _CHECKSUM:
            raise DataError(
                f"{path}: corrupt or truncated file (the part of {name!r} at {list(offset)} unpacks to more than its "
                f"{size} bytes)"
            )


def _fold(dataset: Any, name: str, path: Path) -> int:
    """How many bytes a stored byte can stand for; 0 where that has no known bound."""
    h5z, properties, fold = library("h5py", path).h5z, dataset.id.get_create_plist(), 1
    for index in range(properties.get_nfilters()):
        code, _, _, label = properties.get_filter(index)
        if not h5z.filter_avail(code):
            raise DataError(
                f"{path}: got an array {name!r} that is compressed by filter {code} "
                f"({label.decode(errors='replace') or 'without a name'}), which needs a plugin that is not there, "
                "expected gzip, lzf or none"
            )
        if code in _DEFLATES:
            fold *= DEFLATE
        elif code not in _KEEPS_SIZE:
            fold = 0
    return fold
