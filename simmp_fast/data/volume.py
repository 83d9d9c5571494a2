"""What every reader of image files gives, and what they share."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from simmp_fast.data.errors import DataError
from simmp_fast.messages import Note, one_line

Array = npt.NDArray[Any]

MAX_BYTES = 64 * 2**30  # of one file or array, on any machine
DEFLATE = 1032  # bytes that a byte of deflate (zip, gzip, PNG) stands for at most


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


def check_announced(path: str | Path, what: str, announced: int, stored: int | None = None, fold: int = 1) -> None:
    """Refuse, before memory is taken, more bytes than can be there or than this machine can work with.

    Args:
        path: the file.
        what: what announces them, for the message.
        announced: how many bytes there should be.
        stored: how many bytes of the file hold them; None where their compression has no known bound.
        fold: bytes that one stored byte can stand for: 1, or `DEFLATE`.

    Raises:
        DataError: too many for what is stored, for `MAX_BYTES`, or for half of the machine's memory.
    """
    if stored is not None and announced > fold * stored:
        raise DataError(
            f"{path}: corrupt or truncated file ({what} announces {announced} bytes, but {stored} stored bytes hold "
            f"at most {fold * stored})"
        )
    most = min(MAX_BYTES, _memory() // 2)
    if announced > most:
        raise DataError(
            f"{path}: {what} announces {announced / 2**30:,.1f} GiB, expected at most {most / 2**30:,.1f} GiB "
            "(64 GiB, or half of this machine's memory)"
        )


def _memory() -> int:
    """Bytes of memory of this machine; enough for any file where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 2 * MAX_BYTES


def check_type(dtype: np.dtype[Any], name: str, path: str | Path) -> None:
    """Refuse an array of something else than numbers, before it is read."""
    if dtype.hasobject:
        raise DataError(f"{path}: got Python objects as {name!r}, expected numbers")
    if dtype.kind not in "buif":
        raise DataError(f"{path}: got values of type {dtype}, expected numbers")


def read_content(path: Path) -> bytes:
    """All bytes of a file, if they are not too many."""
    check_announced(path, "the file", path.stat().st_size)
    return path.read_bytes()


class _Collector(logging.Filter):
    """Takes the warnings that this thread logs."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self._thread = threading.get_ident()

    def filter(self, record: logging.LogRecord) -> bool:
        if record.thread != self._thread or record.levelno < logging.WARNING:
            return True
        self.lines.append(one_line(record.getMessage(), 150))
        return False


@contextlib.contextmanager
def noting(path: str | Path, logger: str) -> Iterator[None]:
    """What a library logs about the file `path` inside the block as a `Note` that names it, if the block ends well."""
    collector, log = _Collector(), logging.getLogger(logger)
    log.addFilter(collector)
    try:
        yield
    finally:
        log.removeFilter(collector)
    if lines := list(dict.fromkeys(collector.lines)):
        more = f"; and {len(lines) - 3} more" if len(lines) > 3 else ""
        warnings.warn(Note(f"{path}: {'; '.join(lines[:3])}{more}"), stacklevel=3)


def library(name: str, path: str | Path) -> Any:
    """Import an optional module that the file `path` needs; a `DataError` says what to install if it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.partition(".")[0]
        raise DataError(f"{path}: this kind of file needs {package}: pip install {package}") from None


def spread(array: Array, bits: int) -> Array:
    """Values of fewer than 8 bits as grey values 0..255, as they are shown: uint8; other arrays as they are."""
    if bits >= 8:
        return array
    table = np.rint(np.arange(2**bits) * (255 / (2**bits - 1))).astype(np.uint8)
    return table[array.astype(np.uint8)]
