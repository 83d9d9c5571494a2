"""The prepared cache: one folder that holds a data set ready to train and evaluate on.

    manifest.json       recipe, splits, cases with their geometry, checksums of the files, checksum of itself
    images.npy          uint8 or float16 [slices, channels, S1, S1] of all cases, one after the other
    labels.npy          uint8 [slices, S1, S1]
    native_labels.bin   zlib-compressed uint8 [slices, h, w] of each case, one after the other

Reading maps the two arrays into memory, so that all processes of a machine share one copy. Equal data gives equal
bytes.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from simmp_fast.config import ConfigError, from_mapping, to_mapping
from simmp_fast.data.errors import DataError, reading, refuse_impossible
from simmp_fast.data.formats import Array
from simmp_fast.data.names import listed, nfc
from simmp_fast.data.preprocess import Geometry, Recipe
from simmp_fast.documents import parse_json
from simmp_fast.files import HashingWriter, sha256, write_json
from simmp_fast.messages import why_no_file

FORMAT, VERSION = "simmp_fast cache", 1
MANIFEST, IMAGES, LABELS, NATIVE = "manifest.json", "images.npy", "labels.npy", "native_labels.bin"
FILES = (MANIFEST, IMAGES, LABELS, NATIVE)
SPLITS = ("train", "validation", "test")
# What a stored value is multiplied with to give 0..1.
SCALES = {"uint8": 1 / 255, "float16": 1.0}

T = TypeVar("T")


@dataclass(frozen=True)
class FileRecord:
    """Size and checksum of one file of the cache."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class CaseRecord:
    """Where one case lies in the cache, and in its own file."""

    id: str
    source: str
    first: int
    slices: int
    native_first: int
    native_bytes: int
    geometry: Geometry


@dataclass(frozen=True)
class Manifest:
    """All that a cache holds besides pixels."""

    format: str
    version: int
    recipe: Recipe
    image_dtype: str
    splits: dict[str, tuple[str, ...]]
    files: dict[str, FileRecord]
    cases: tuple[CaseRecord, ...]


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class CacheWriter:
    """Fills `folder` with a cache, case by case; a context manager.

    The arrays are streamed rather than mapped: a full disk is then an `OSError`, not a killed process.
    """

    def __init__(self, folder: Path, recipe: Recipe, slices: int, image_dtype: str) -> None:
        self._folder, self._recipe, self._slices, self._dtype = folder, recipe, slices, image_dtype
        self._cases: list[CaseRecord] = []
        self._first = 0
        self._files = {name: HashingWriter(folder / name) for name in (IMAGES, LABELS, NATIVE)}
        side = recipe.image_size
        self._header(IMAGES, image_dtype, (slices, recipe.channels, side, side))
        self._header(LABELS, "uint8", (slices, side, side))

    def __enter__(self) -> CacheWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        for file in self._files.values():
            file.__exit__()

    def _header(self, name: str, dtype: str, shape: tuple[int, ...]) -> None:
        header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._files[name], header)

    def add(
        self, case_id: str, source: str, images: Array, labels: Array, native_labels: Array, placed: Geometry
    ) -> None:
        """Append a case.

        Args:
            case_id: its name, unique in the cache.
            source: the file it came from.
            images: float32 `[slices, channels, S1, S1]` in 0..1.
            labels: uint8 `[slices, S1, S1]`.
            native_labels: uint8 `[slices, h, w]`.
            placed: where the slices lie in the file.
        """
        stored = np.rint(images * 255).astype(np.uint8) if self._dtype == "uint8" else images.astype(np.float16)
        native = zlib.compress(np.ascontiguousarray(native_labels).tobytes(), level=1)
        record = CaseRecord(case_id, source, self._first, len(images), self._files[NATIVE].bytes, len(native), placed)
        self._files[IMAGES].write(stored)
        self._files[LABELS].write(np.ascontiguousarray(labels))
        self._files[NATIVE].write(native)
        self._cases.append(record)
        self._first += len(images)

    def finish(self, splits: dict[str, list[str]]) -> None:
        """Close the arrays and write the manifest."""
        if self._first != self._slices:
            raise ValueError(f"slices: got {self._first}, expected the {self._slices} that were announced")
        self.__exit__()
        files = {name: FileRecord(file.bytes, file.sha256()) for name, file in self._files.items()}
        parts = {name: tuple(ids) for name, ids in splits.items()}
        manifest = Manifest(FORMAT, VERSION, self._recipe, self._dtype, parts, files, tuple(self._cases))
        content = to_mapping(manifest)
        write_json(self._folder / MANIFEST, {"checksum": _checksum(content), **content})


class Case:
    """One case of a cache.

    Attributes:
        id: its name.
        slices: number of slices.
        images: uint8 or float16 `[slices, channels, S1, S1]`, mapped read-only; `image` gives 0..1.
        labels: uint8 `[slices, S1, S1]`, mapped read-only.
        spacing: millimetres between (slices, rows, columns).
        native_shape: (slices, h, w) at native size.
        geometry: where the slices lie in the file.
        source: the file it came from.
    """

    def __init__(self, cache: Cache, record: CaseRecord) -> None:
        part = slice(record.first, record.first + record.slices)
        self.id, self.slices, self.source = record.id, record.slices, record.source
        self.images, self.labels = cache.images[part], cache.labels[part]
        self.geometry, self.spacing = record.geometry, record.geometry.spacing
        self.native_shape = record.geometry.slice_shape
        self._cache, self._record = cache, record

    def image(self, index: int) -> Array:
        """Slice `index` as the network sees it: float32 `[channels, S1, S1]` in 0..1.

        Raises:
            DataError: a value that is not finite.
        """
        image: Array = self.images[index].astype(np.float32) * np.float32(self._cache.image_scale)
        if not np.isfinite(image).all():
            path = self._cache.folder / IMAGES
            raise DataError(f"{path}: damaged cache (case {self.id}, slice {index}: not finite); run prepare again")
        return image

    def checked_labels(self) -> Array:
        """`labels`, after a look at every one.

        Raises:
            DataError: labels that are no class.
        """
        self._check_classes(self.labels, LABELS)
        return self.labels

    def native_labels(self) -> Array:
        """The labels at their own size: uint8 `[slices, h, w]`, in slice order.

        Raises:
            DataError: the file is damaged, or holds labels that are no class.
        """
        path = self._cache.folder / NATIVE
        try:
            with open(path, "rb") as file:
                file.seek(self._record.native_first)
                content = _decompressed(file.read(self._record.native_bytes), math.prod(self.native_shape))
            labels: Array = np.frombuffer(content, np.uint8).reshape(self.native_shape)
        except (OSError, OverflowError, zlib.error, ValueError) as error:
            raise DataError(f"{path}: damaged cache (case {self.id}: {error}); run prepare again") from None
        self._check_classes(labels, NATIVE)
        return labels

    def _check_classes(self, labels: Array, name: str) -> None:
        count = len(self._cache.classes)
        if labels.max() >= count:
            wrong = np.unique(labels)
            found = ", ".join(str(value) for value in wrong[wrong >= count][:8])
            raise DataError(
                f"{self._cache.folder / name}: damaged cache (case {self.id}: got labels {found}, expected 0 to "
                f"{count - 1}); run prepare again"
            )


def _decompressed(content: bytes, size: int) -> bytes:
    """Exactly `size` bytes; more are an error before they take memory."""
    decoder = zlib.decompressobj()
    plain = decoder.decompress(content, size)
    if len(plain) < size or decoder.decompress(decoder.unconsumed_tail, 1) or not decoder.eof:
        raise ValueError(f"expected {size} pixels, got {'fewer' if len(plain) < size else 'more'}")
    return plain


class Cache:
    """A prepared cache, read-only. Open one with `Cache.open`.

    Attributes:
        folder: where it lies.
        name, classes, channels, image_size: as in `recipe`.
        recipe: what `predict` needs to treat a new file in the same way.
        splits: "train", "validation", "test" to case ids.
        images: uint8 or float16 `[all slices, channels, S1, S1]`; times `image_scale` gives 0..1.
        labels: uint8 `[all slices, S1, S1]`.
        checksum: identifies the content: equal checksums, equal caches.
    """

    def __init__(self, folder: Path, manifest: Manifest, checksum: str) -> None:
        recipe = manifest.recipe
        self.folder, self.recipe, self.checksum = folder, recipe, checksum
        self.name, self.channels, self.image_size = recipe.name, recipe.channels, recipe.image_size
        self.classes = list(recipe.classes)
        self.splits = {name: list(ids) for name, ids in manifest.splits.items()}
        self.image_scale = SCALES[manifest.image_dtype]
        self._records = {record.id: record for record in manifest.cases}
        total, side = sum(r.slices for r in manifest.cases), self.image_size
        self.images = _mapped(folder / IMAGES, manifest.image_dtype, (total, self.channels, side, side))
        self.labels = _mapped(folder / LABELS, "uint8", (total, side, side))

    @classmethod
    def open(cls, folder: str | Path, verify: bool = False) -> Cache:
        """Open the cache in `folder`.

        The manifest's checksum, and that every file is there in its full size, are always checked.

        Args:
            folder: as given to `prepare`.
            verify: read every file and compare its checksum as well.

        Raises:
            DataError: no cache, another version, or damage; the message names the file.
        """
        folder = Path(folder)
        refuse_impossible(folder)
        manifest, checksum = _read_manifest(folder / MANIFEST)
        for name in (IMAGES, LABELS, NATIVE):
            path, record = folder / name, manifest.files[name]
            if not path.is_file():
                raise DataError(f"{path}: missing from the cache; run prepare again")
            with reading(path):
                size = path.stat().st_size
                differs = verify and size == record.bytes and sha256(path) != record.sha256
            if size != record.bytes:
                raise DataError(f"{path}: damaged cache (got {size} bytes, expected {record.bytes}); run prepare again")
            if differs:
                raise DataError(f"{path}: damaged cache (its checksum differs); run prepare again")
        return cls(folder, manifest, checksum)

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker process maps the files anew instead of receiving a copy of the arrays.
        return Cache.open, (self.folder,)

    def case(self, case_id: str) -> Case:
        """The case `case_id`; raises `DataError` for a name that is not in the cache."""
        case_id = case_id if case_id in self._records else nfc(case_id)
        if case_id not in self._records:
            raise DataError(f"{self.folder}: no case {case_id!r}, expected one of {', '.join(self._records)}")
        return Case(self, self._records[case_id])

    def slice_at(self, position: int) -> tuple[Array, Array]:
        """Image `[channels, S1, S1]` as stored and labels uint8 `[S1, S1]` at a position of `split_slices`.

        Raises:
            DataError: a value that is not finite, or a label that is no class.
        """
        image, label = self.images[position], self.labels[position]
        if label.max() >= len(self.classes) or not np.isfinite(image).all():
            record = next(r for r in self._records.values() if r.first <= position < r.first + r.slices)
            case = Case(self, record)
            case.image(position - record.first)
            case.checked_labels()
        return image, label

    def split_slices(self, split: str) -> Array:
        """Positions (int64) in `images` and `labels` of the slices of a split, case by case.

        Raises:
            DataError: an unknown split, or one without slices.
        """
        if split not in self.splits:
            raise DataError(f"split: got {split!r}, expected one of {', '.join(self.splits)}")
        records = [self._records[case_id] for case_id in self.splits[split]]
        if not records:
            raise DataError(f"{self.folder}: the split {split!r} has no cases")
        return np.concatenate([np.arange(r.first, r.first + r.slices, dtype=np.int64) for r in records])


def is_cache(folder: str | Path) -> bool:
    """Whether `folder` holds a cache of any version, damaged or not."""
    path = Path(folder) / MANIFEST
    if why_no_file(path):
        return False
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except OSError:
        return False
    except ValueError:
        return (Path(folder) / NATIVE).is_file()  # a name that nothing else has
    return isinstance(content, dict) and content.get("format") == FORMAT


def _read_manifest(path: Path) -> tuple[Manifest, str]:
    if why := why_no_file(path):
        raise DataError(f"{path.parent}: not a prepared cache ({MANIFEST}: {why}); run prepare")
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path.parent}: not a prepared cache ({MANIFEST}: {error.strerror}); run prepare") from None
    except ValueError as error:
        raise DataError(f"{path}: damaged cache ({error}); run prepare again") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DataError(f"{path}: not the manifest of a prepared cache")
    if content.get("version") != VERSION:
        raise DataError(f"{path}: got cache version {content.get('version')}, expected {VERSION}; run prepare again")
    checksum = content.pop("checksum", None)
    if checksum != _checksum(content):
        raise DataError(f"{path}: damaged cache (its checksum differs); run prepare again")
    try:
        manifest = from_mapping(Manifest, content)
    except ConfigError as error:
        raise DataError(f"{path}: damaged cache ({error}); run prepare again") from None
    for problem in _contradictions(manifest):
        raise DataError(f"{path}: damaged cache ({problem}); run prepare again")
    return manifest, checksum


def _contradictions(manifest: Manifest) -> Iterator[str]:
    """What no `CacheWriter` writes, as "got, expected"."""
    if manifest.image_dtype not in SCALES:
        yield f"image_dtype: got {manifest.image_dtype!r}, expected one of {', '.join(SCALES)}"
    if missing := [name for name in (IMAGES, LABELS, NATIVE) if name not in manifest.files]:
        yield f"files: got none named {', '.join(missing)}"
    first = native_first = 0
    for case in manifest.cases:
        placed, where = case.geometry, f"case {case.id}"
        if sorted(placed.order) != [0, 1, 2] or min((*placed.shape, *placed.slice_shape)) < 1:
            yield f"{where}: got shape {list(placed.shape)} in the order {list(placed.order)}, expected three axes"
        elif case.slices != placed.slice_shape[0]:
            yield f"{where}: got {case.slices} slices, expected {placed.slice_shape[0]} as its geometry has"
        if (case.first, case.native_first) != (first, native_first) or case.native_bytes < 1:
            got = f"{case.native_bytes} bytes at {case.native_first}, slices at {case.first}"
            yield f"{where}: got {got}, expected those that follow the case before it"
        first, native_first = first + case.slices, native_first + case.native_bytes
    if native_first != manifest.files[NATIVE].bytes:
        yield f"files.{NATIVE}: got {manifest.files[NATIVE].bytes} bytes, expected {native_first} as its cases have"
    ids = {case.id for case in manifest.cases}
    if len(ids) != len(manifest.cases):
        yield "cases: got one name twice"
    if unknown := {name for names in manifest.splits.values() for name in names} - ids:
        yield f"splits: got {listed(sorted(unknown))}, expected names of cases"


def _mapped(path: Path, dtype: str, shape: tuple[int, ...]) -> Array:
    try:
        array = np.load(path, mmap_mode="r")
    except MemoryError:
        raise
    except OSError as error:
        if error.errno == errno.ENOMEM:  # the cache may be whole
            raise
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    except Exception as error:  # a damaged header meets Python's own parser
        raise DataError(f"{path}: damaged cache ({error}); run prepare again") from None
    if not isinstance(array, np.ndarray):
        raise DataError(f"{path}: damaged cache (got an archive, expected an array); run prepare again")
    if array.dtype != dtype or array.shape != shape:
        got = f"{array.dtype} {list(array.shape)}"
        raise DataError(f"{path}: damaged cache (got {got}, expected {dtype} {list(shape)}); run prepare again")
    return array
