"""Folders that appear complete or not at all, new or in the place of others."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import sys
from collections.abc import Collection, Iterator
from pathlib import Path

from simmp_fast.files import is_temporary, remove_leftovers, remove_tree, sync, temporary_name

with contextlib.suppress(ImportError):  # Windows has none
    import fcntl

# A whole folder inside the one that it fills: from its name on, what it holds counts, and has only to be moved out.
READY = ".simmp-fast-ready"


class UnfinishedError(OSError):
    """All files of a folder were written, but not all are known to be in their place; `finish_folder` completes it."""


@contextlib.contextmanager
def atomic_folder(path: str | Path, *, replace: bool, last: str) -> Iterator[Path]:
    """A temporary folder to fill with files.

    When the block ends well its files are synced and are those of `path`; when it does not, `path` is as before and the
    temporary folder, and parents made for it, are gone. Links are followed.

    A folder that is new gets its name in one step. One that is there and empty stays itself, for it may be a mounted
    volume or the only place that can be written: it is filled from inside, `last` at the end. One that is to be
    replaced changes places with the new one in one step, or is filled from inside where that cannot be had. What is
    killed as it fills a folder from inside is finished by `finish_folder`.

    Args:
        path: the folder.
        replace: it may hold files of the same names, which give way to the new ones.
        last: the file that makes the folder whole; no reader takes one without it.

    Raises:
        FileExistsError: `path` holds anything else, now or when the block ends.
        OSError: the folder cannot be written (`UnfinishedError`: or its new files cannot be moved into their place).
    """
    path = Path(os.path.realpath(path))  # `Path.resolve` does not bear a link to itself
    finish_folder(path, last)
    there = path.is_dir()
    if there and not replace and (found := others(path)):
        raise _taken(path, found)
    made = [parent for parent in path.parents if not parent.exists()]
    remove_leftovers(path.parent)
    temporary = temporary_name(path / path.name if there else path)
    try:
        temporary.mkdir(parents=True)
        if there and (path / last).exists():
            temporary = _beside_if_possible(temporary, path)
        yield temporary
        files = list(temporary.rglob("*"))
        for file in files:
            sync(file)
        sync(temporary)
        if there:
            with _locked(path):
                _fill(path, temporary, {file.name for file in files} if replace else set(), last)
        else:
            _rename_new(temporary, path)
    except BaseException:
        for place in (temporary, path.with_name(temporary.name)):  # in either, if it was being moved out
            remove_tree(place)
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise


def finish_folder(path: str | Path, last: str) -> None:
    """Move the files out that a killed `atomic_folder` had ready in `path`, and remove what others left in it."""
    path = Path(os.path.realpath(path))
    if path.is_dir():
        if os.path.lexists(path / READY):
            with _locked(path):
                _move_out(path, last)
        remove_leftovers(path)


def _beside_if_possible(temporary: Path, path: Path) -> Path:
    """Move an empty folder out of `path`; where that cannot be, `path` is mounted, or its parent cannot be written."""
    beside = path.with_name(temporary.name)
    try:
        os.rename(temporary, beside)
    except OSError:
        return temporary
    return beside


def _rename_new(new: Path, path: Path) -> None:
    try:
        os.rename(new, path)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise _taken(path, []) from error
        raise
    with _unfinished(path):
        sync(path.parent)


@contextlib.contextmanager
def _unfinished(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UnfinishedError(error.errno, error.strerror, str(path)) from error


def _taken(path: Path, names: list[str]) -> FileExistsError:
    found = ", ".join(names[:8]) or "something"
    return FileExistsError(errno.EEXIST, f"{found} was put there meanwhile", str(path))


def others(path: str | Path, owned: Collection[str] = ()) -> list[str]:
    """The names in folder `path` that are none of `owned`, no temporaries, and not what a new volume has."""
    passed = {*owned, "lost+found"}
    return sorted(name for name in os.listdir(path) if name not in passed and not is_temporary(name))


def _fill(path: Path, new: Path, owned: Collection[str], last: str) -> None:
    """Make the files of `new` those of `path`, where `owned` may be replaced."""
    _move_out(path, last)
    if found := others(path, owned):
        raise _taken(path, found)
    if new.parent == path.parent:
        if _changed_places(new, path, owned):
            return
        inside = path / new.name
        os.rename(new, inside)
        new = inside
    try:
        os.rename(new, path / READY)
        with _unfinished(path):
            sync(path)
            _move_out(path, last)
    except BaseException:
        remove_tree(new)  # where it was not renamed
        with contextlib.suppress(OSError):
            _move_out(path, last)  # where it was: an interrupt, or trouble that passes, must not leave it half moved
        raise


def _changed_places(new: Path, path: Path, owned: Collection[str]) -> bool:
    """Exchange two folders in one step and remove the old one; False where that cannot be had."""
    if not set(os.listdir(path)) <= set(owned):
        return False  # another process fills it from inside
    try:
        _exchange(new, path)
    except OSError:
        return False
    if found := others(new, owned):  # put there as they changed places
        _exchange(new, path)
        raise _taken(path, found)
    with _unfinished(path):
        sync(path.parent)
    remove_tree(new)
    return True


def _exchange(first: Path, second: Path) -> None:
    """Exchange two names in one step, which Linux can do on most file systems."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if call is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), str(first))
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if call(here, os.fsencode(first), here, os.fsencode(second), exchange) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(first))


def _move_out(path: Path, last: str) -> None:
    """Move what is ready out into `path`, so that `last` is never there beside files that it does not describe."""
    ready = path / READY
    if ready.is_symlink() or not ready.is_dir():
        return
    if (ready / last).exists():
        (path / last).unlink(missing_ok=True)
        sync(path)
    for file in sorted(ready.iterdir(), key=lambda file: file.name == last):
        if file.name == last:
            sync(path)
        os.replace(file, path / file.name)
    sync(path)
    ready.rmdir()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keep other processes out of the block, where the system can lock a folder. A killed process keeps no lock."""
    if os.name != "posix":
        yield
        return
    while True:
        handle = os.open(path, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):  # some network disks lock no folder
                fcntl.flock(handle, fcntl.LOCK_EX)
            if os.path.samestat(os.fstat(handle), os.stat(path)):  # otherwise it was replaced as this one waited
                yield
                return
        finally:
            os.close(handle)
