"""Writing files and folders so that nothing half-written is ever seen, and their checksums."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def _end(path: Path) -> str:
    """The end of a name that may be as long as a name can be: with something before it, it must still be one."""
    return path.name[-32:]


def _beside(path: Path) -> Path:
    """A new hidden name in the folder of `path`; it ends as `path` does, so that writers see the same extension."""
    return path.with_name(f".{uuid.uuid4().hex[:12]}-{_end(path)}")


def _host() -> str:
    return re.sub(r"[^\w.-]", "_", socket.gethostname())


def _folder_beside(path: Path) -> Path:
    """A new hidden name for a folder, which says the process that fills it."""
    return path.with_name(f".simmp-fast-{_host()}-{os.getpid()}-{uuid.uuid4().hex[:12]}-{_end(path)}")


def _remove_leftovers(path: Path) -> None:
    """Remove the folders of `_folder_beside` that a process of this machine left which runs no more."""
    ours = re.compile(rf"\.simmp-fast-{re.escape(_host())}-(\d{{1,7}})-[0-9a-f]{{12}}-{re.escape(_end(path))}")
    for entry in list(path.parent.iterdir()) if path.parent.is_dir() else []:
        match = ours.fullmatch(entry.name)
        if match and entry.is_dir() and not entry.is_symlink() and not _is_running(int(match[1])):
            shutil.rmtree(entry, ignore_errors=True)


def _is_running(pid: int) -> bool:
    if os.name != "posix":
        return True  # signal 0 is no question there: it interrupts
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # somebody else's
    return True


def _sync(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk."""
    if path.is_dir() and os.name != "posix":
        return  # other systems cannot open a folder
    # Windows syncs what was opened for writing, and nothing else.
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """A temporary path to write to, in the folder of `path` (made if it is missing).

    When the block ends well the file is synced and renamed onto `path`; when it does not, `path` is as before and the
    temporary file is gone.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder to fill, beside `path`.

    When the block ends well its files are synced and it takes the place of `path` (a folder already there is replaced);
    when it does not, `path` is as before and the temporary folder, and parents made for it, are gone. What an earlier
    process left that was killed as it filled the same folder goes first. Links are followed.
    """
    path = Path(os.path.realpath(path))  # `Path.resolve` does not bear a link to itself
    made = [parent for parent in path.parents if not parent.exists()]
    _remove_leftovers(path)
    temporary = _folder_beside(path)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for file in temporary.rglob("*"):
            _sync(file)
        _sync(temporary)
        _take_place(temporary, path)
        _sync(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise


def _take_place(new: Path, path: Path) -> None:
    """Rename folder `new` to `path`; what was there is removed only once the new folder has its name."""
    if not path.exists():
        os.rename(new, path)
        return
    old = _folder_beside(path)
    os.rename(path, old)
    try:
        os.rename(new, path)
    except BaseException:
        os.rename(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def write_json(path: str | Path, content: Any) -> None:
    """Write `content` as indented JSON, atomically."""
    with atomic_file(path) as temporary:
        text = json.dumps(content, indent=1, ensure_ascii=False)
        # A lone surrogate, such as a byte of a file's name that is not UTF-8, becomes an escape that JSON knows.
        temporary.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")


def sha256(path: str | Path) -> str:
    """The SHA-256 checksum of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class HashingWriter:
    """A new file that is written from front to back and whose checksum is known at the end."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "xb")  # noqa: SIM115 - closed in __exit__
        self._hash = hashlib.sha256()
        self.bytes = 0

    def __enter__(self) -> HashingWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def write(self, data: Any) -> int:
        """Append a bytes-like object; returns its length in bytes."""
        view = memoryview(data).cast("B")
        self._file.write(view)
        self._hash.update(view)
        self.bytes += view.nbytes
        return view.nbytes

    def sha256(self) -> str:
        """The checksum of all that was written so far."""
        return self._hash.hexdigest()
