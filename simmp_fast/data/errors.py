"""The error for files and data that cannot be used."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator, Sequence
from pathlib import Path

from simmp_fast.data.names import NOT_UTF8, is_utf8, printable

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
    try:
        yield
    except OSError as error:
        raise DataError(f"{error.filename or path}: cannot be read ({error.strerror or error})") from error


@contextlib.contextmanager
def disk_errors(path: str | Path) -> Iterator[None]:
    """Turn an `OSError` of the block, such as a full disk, into a `DataError` that names `path`, what was written."""
    try:
        yield
    except OSError as error:
        reason = "the disk is full" if error.errno in _FULL else f"cannot be written ({error.strerror or error})"
        raise DataError(f"{path}: {reason}; nothing was left behind") from error


def refuse_other_than_utf8(path: str | Path) -> None:
    """Raise `DataError` if a name in `path` is not UTF-8."""
    if not is_utf8(path):
        raise DataError(f"{path}: {NOT_UTF8}")


class Note(UserWarning):
    """What is worth knowing of a file that can be used all the same; the command line shows it as a line."""
