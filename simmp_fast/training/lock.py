"""The lock on a run folder: one process at a time writes there."""

from __future__ import annotations

import contextlib
import importlib
import os
import socket
from pathlib import Path
from typing import IO, Any

from simmp_fast.config import ConfigError
from simmp_fast.training.errors import TrainingError

_held: set[Path] = set()
_folders: set[int] = set()  # descriptors of the folders that this process has locked
_MARK = b"pid "  # how a lock file begins
_FAR = 2**30  # place in the lock file of the byte that Windows locks: nobody can read a locked one


def _forget_folders() -> None:
    """In a process that was forked: data loading processes may outlive a killed trainer, and would hold its locks."""
    while _folders:
        os.close(_folders.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_folders)


def _lock(file: IO[bytes], hold: bool) -> None:
    """Take the system's lock on an open file, or give it back.

    Raises:
        BlockingIOError, PermissionError: another process holds it.
        OSError: the file system has no locks.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        msvcrt: Any = importlib.import_module("msvcrt")
        os.lseek(file.fileno(), _FAR, os.SEEK_SET)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK if hold else msvcrt.LK_UNLCK, 1)
    else:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB if hold else fcntl.LOCK_UN)


def _lock_folder(folder: Path) -> int | None:
    """A descriptor of `folder` that holds a lock on it, as far as the file system locks folders; None on Windows.

    Raises:
        BlockingIOError: another process holds it.
    """
    try:
        import fcntl
    except ImportError:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError:
        pass  # some network file systems lock files alone; the descriptor still knows the folder
    _folders.add(descriptor)
    return descriptor


def _unlock_folder(descriptor: int) -> None:
    import fcntl

    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing it is not enough while a child is about to forget it
    os.close(descriptor)


class FolderLock:
    """An exclusive lock on a folder, released by the system when its process ends, however it ends.

    Two locks: one on the folder itself, which goes where the folder goes and cannot be deleted, and one on `run.lock`
    in it, for file systems that do not lock folders. The latter is a record lock (`lockf`; on Windows
    `msvcrt.locking`), which does not exclude the same process, hence `_held`.

    Raises:
        ConfigError: another process, or this one, holds the folder, or it cannot be written; names it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, (folder / "run.lock").resolve()
        if self.path in _held:
            raise ConfigError(f"{folder}: this process (pid {os.getpid()}) is already training there")
        self._descriptor: int | None = None
        self._file: IO[bytes] | None = None
        try:
            self._take()
        except BaseException:
            self._close()
            raise
        _held.add(self.path)

    def _take(self) -> None:
        try:
            self._descriptor = _lock_folder(self.folder)
            self._file = open(self.path, "ab+", buffering=0)  # noqa: SIM115 - open as long as the lock is held
            _lock(self._file, hold=True)
        except (BlockingIOError, PermissionError) as error:
            if isinstance(error, PermissionError) and error.filename is not None:
                raise ConfigError(f"{error.filename}: cannot be written ({error.strerror})") from None
            raise ConfigError(
                f"{self.folder}: run folder in use by {self._holder()}; wait for it, stop it, or choose another folder"
            ) from None
        except OSError as error:
            if error.filename is not None:
                raise ConfigError(f"{error.filename}: cannot be written ({error.strerror})") from None
            raise ConfigError(f"{self.folder}: this file system cannot lock files ({error.strerror})") from None
        try:
            self._file.seek(0)
            if not _MARK.startswith(self._file.read(len(_MARK))):
                raise ConfigError(
                    f"{self.path}: got a file that is no lock of a run, expected one or none; move it away"
                )
            self._file.truncate(0)  # whoever is named there is dead: the lock was free
            self._file.write(_MARK + f"{os.getpid()} on {socket.gethostname()}\n".encode())
        except OSError as error:
            raise ConfigError(f"{self.path}: cannot be written ({error.strerror})") from None

    def _holder(self) -> str:
        """What the process that holds the lock wrote into the file."""
        try:
            if self._file is None:
                return self.path.read_text(encoding="utf-8", errors="replace").strip() or "another process"
            self._file.seek(0)
            return self._file.read(200).decode(errors="replace").strip() or "another process"
        except OSError:
            return "another process"

    def check_in_place(self) -> None:
        """Raise `TrainingError` if the folder was moved or removed since, so that nothing is written in its place."""
        if self._descriptor is None:
            return  # such systems do not move a folder with open files
        try:
            if os.path.samestat(os.fstat(self._descriptor), os.stat(self.folder)):
                return
        except OSError:
            pass
        raise TrainingError(
            f"{self.folder}: the folder was moved or removed while the run wrote there; its last checkpoint went with "
            "it. Resume the run where the folder is now"
        )

    def release(self) -> None:
        """Give the folder free. The file stays: removing it would let two processes lock two files."""
        if self.path in _held:
            _held.discard(self.path)
            self._close(named=True)

    def _close(self, named: bool = False) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # the system takes the lock back whatever becomes of this
                if named:
                    self._file.truncate(0)
                    _lock(self._file, hold=False)
            self._file.close()
        if self._descriptor is not None and self._descriptor in _folders:
            _folders.discard(self._descriptor)
            _unlock_folder(self._descriptor)
