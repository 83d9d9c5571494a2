"""The error for files and data that cannot be used."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from simmp_fast.data.names import name_problem
from simmp_fast.folders import UnfinishedError
from simmp_fast.messages import escaped, printable

_FULL = (errno.ENOSPC, errno.EDQUOT)


class DataError(ValueError):
    """Files or data that cannot be used: names the file, what was found and what is needed. Its text is printable."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))

    @classmethod
    def listing(cls, what: str, problems: Sequence[str]) -> DataError:
        """One error for all `problems`, each on its own line under a heading."""
        noun = "problem" if len(problems) == 1 else "problems"
        return cls(f"{what}: {len(problems)} {noun}\n" + "\n".join(f"  {problem}" for problem in problems))


@contextlib.contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Turn an `OSError` of the block, such as a missing permission, into a `DataError` that names `path`."""
    refuse_impossible(path)
    try:
        yield
    except OSError as error:
        raise DataError(f"{error.filename or path}: cannot be read ({error.strerror or error})") from error


@contextlib.contextmanager
def disk_errors(path: str | Path) -> Iterator[None]:
    """Turn an `OSError` of the block, such as a full disk, into a `DataError` that names `path`, what was written."""
    refuse_impossible(path)
    try:
        yield
    except OSError as error:
        reason = "the disk is full" if error.errno in _FULL else f"cannot be written ({error.strerror or error})"
        state = "nothing was left behind"
        if isinstance(error, UnfinishedError):
            state = "all was written; run it again, and what is not in its place is moved there"
        raise DataError(f"{path}: {reason}; {state}") from error


def refuse_impossible(path: str | Path) -> None:
    """Raise `DataError` if no file can have the name `path`, wherever it is."""
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        raise DataError(f"{path}: got a name that this system cannot write, expected another one") from None
    if "\0" in str(path):
        shown = str(path).replace("\0", "\\0")
        raise DataError(f"{shown}: got a name with a NUL character, expected one without")


def refuse_other_than_utf8(path: str | Path) -> None:
    """Raise `DataError` if a name in `path` is not UTF-8, or none that a file can have."""
    refuse_impossible(path)
    if why := name_problem(path):
        raise DataError(f"{escaped(str(path))}: {why}")
