"""From a data set to a cache: everything is checked first, then written as a whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from tqdm import tqdm

from simmp_fast.console import Console
from simmp_fast.data.cache import FILES, MANIFEST, Cache, CacheWriter, is_cache
from simmp_fast.data.errors import DataError, disk_errors, reading, refuse_other_than_utf8
from simmp_fast.data.formats import Array
from simmp_fast.data.names import listed, report
from simmp_fast.data.preprocess import Recipe, network_input, normalised_slices, resize_label, to_slices
from simmp_fast.data.sources import Source, SourceCase
from simmp_fast.files import check_length
from simmp_fast.folders import atomic_folder, finish_folder, others

T = TypeVar("T")


def prepare(
    source: Source, out_folder: str | Path, image_size: int, force: bool = False, progress: bool = True
) -> Cache:
    """Check a data set and write its cache.

    Images are uint8 if every image of the data set has 8-bit values, float16 otherwise. Files that are no part of the
    data set are named on standard error.

    Args:
        source: the data set, from `open_source`.
        out_folder: the cache's folder; it appears when it is complete, and not before. One that is there must be empty
            (or hold a cache, with `force`). What was killed as it moved a whole cache into its place is completed.
        image_size: side of the network's square in pixels [S1].
        force: replace a cache that is already there.
        progress: show progress bars where standard error is a terminal.

    Raises:
        DataError: bad files, every one named; `out_folder` is in the way, or cannot be written.
        ConfigError: splits or settings that do not fit the data.
    """
    out = Path(out_folder)
    refuse_other_than_utf8(out)
    with disk_errors(out):
        finish_folder(out, MANIFEST)
        _refuse_existing(out, force)
        _refuse_unwritable(out)
    recipe = source.recipe(image_size)
    _say_left_out(source)
    found = check(source, recipe, progress)
    splits = source.splits()
    chosen = {case_id for ids in splits.values() for case_id in ids}
    cases = [case for case in source.cases if case.id in chosen]
    eight_bit = all(found[case.id][1] == np.uint8 for case in cases)
    slices = sum(found[case.id][0] for case in cases)
    dtype = "uint8" if eight_bit else "float16"
    with (
        disk_errors(out),
        atomic_folder(out, replace=force, last=MANIFEST) as folder,
        CacheWriter(folder, recipe, slices, dtype) as writer,
    ):
        for case in _bar(cases, "writing", progress):
            _write(case, recipe, writer)
        writer.finish(splits)
    return Cache.open(out)


def check(source: Source, recipe: Recipe, progress: bool = True) -> dict[str, tuple[int, np.dtype]]:
    """Read and check every file of a data set.

    Returns:
        for each case id, its number of slices and the dtype of its image.

    Raises:
        DataError: names every file that cannot be used, and why.
    """
    problems = list(source.problems)
    first_with: dict[bytes, str] = {}
    found = {}
    for case in _bar(source.cases, "checking", progress):
        try:
            with _enough_memory(case), reading(case.source):
                image, _ = case.load()
                slices, _ = normalised_slices(image, recipe)
                content = _content(image.array)
        except DataError as error:
            problems += str(error).splitlines()  # a case of several files may have several
            continue
        found[case.id] = len(slices), image.array.dtype
        first = first_with.setdefault(content, case.source)
        if first != case.source:
            problems.append(f"{case.source}: holds the same image as {first}")
    if problems:
        raise DataError.listing(f"data set {source.name!r} cannot be prepared", problems)
    return found


def _write(case: SourceCase, recipe: Recipe, writer: CacheWriter) -> None:
    with _enough_memory(case):
        with reading(case.source):
            image, label = case.load()
        images, placed = network_input(image, recipe)
        native = to_slices(label, placed)
        small = resize_label(native, (recipe.image_size, recipe.image_size))
        writer.add(case.id, case.source, images, small, native, placed)


@contextlib.contextmanager
def _enough_memory(case: SourceCase) -> Iterator[None]:
    """Turn a `MemoryError` of the block into a `DataError` that names the case's file."""
    try:
        yield
    except MemoryError as error:
        wanted = f": {error}" if str(error) else ""
        raise DataError(f"{case.source}: not enough memory{wanted}") from error


def _say_left_out(source: Source) -> None:
    lines: Sequence[str] = getattr(source, "left_out", ())  # a source made up in memory has no files to leave out
    if lines:
        print(report(f"data set {source.name!r}, left out: {len(lines)}", lines), file=sys.stderr)


def _content(array: Array) -> bytes:
    """Identifies the pixels, however the file holds them."""
    checksum = hashlib.sha256(f"{array.dtype}{array.shape}".encode())
    checksum.update(np.ascontiguousarray(array).data)
    return checksum.digest()


def _refuse_existing(out: Path, force: bool) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise DataError(f"{out}: is a file, expected a folder to write")
    if out.samefile(os.curdir):
        raise DataError(f"{out}: is the current folder, expected another one: it would be replaced as a whole")
    if is_cache(out):
        if not force:
            raise DataError(f"{out}: already holds a prepared cache; use force to replace it")
        if found := others(out, [name for name in FILES if not (out / name).is_dir()]):
            raise DataError(f"{out}: holds {listed(found)} beside the cache to replace, expected a cache alone")
    elif others(out):
        raise DataError(f"{out}: the folder holds other files, expected a new or an empty one")


def _refuse_unwritable(out: Path) -> None:
    """Raise `OSError` where `out` cannot be made or filled: before hours of reading rather than after."""
    real = Path(os.path.realpath(out))
    check_length(real)
    place = next(path for path in (real, *real.parents) if os.path.exists(path))
    if not place.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    if not os.access(place, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def _bar(items: Sequence[T], what: str, progress: bool) -> Iterable[T]:
    # disable=None: silent unless standard error is a terminal
    bar: Iterable[T] = tqdm(items, desc=what, unit="case", disable=None if progress else True, file=Console(sys.stderr))
    return bar
