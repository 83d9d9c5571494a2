"""Files that appear complete or not at all, what killed processes leave of them, and checksums."""

from __future__ import annotations

import contextlib
import errno
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

_live: set[str] = set()  # the temporaries of this process


def _host() -> str:
    return re.sub(r"[^\w.-]", "_", socket.gethostname(), flags=re.ASCII)[:64]


def temporary_name(path: Path) -> Path:
    """A new hidden name in the folder of `path`, which says the process that writes it.

    It ends as `path` does, so that writers see the same extension; no more of it, for it must be a name however long
    that of `path` is.
    """
    name = f".simmp-fast-{_host()}-{os.getpid()}-{uuid.uuid4().hex[:12]}-{path.name[-32:]}"
    _live.add(name)
    return path.with_name(name)


def check_length(path: str | Path) -> None:
    """Raise `OSError` if the name of a file or folder, which need not exist, or of one of its parents is too long."""
    path = Path(path).absolute()
    there = next((parent for parent in path.parents if os.path.lexists(parent)), path)
    # A system looks no further than a folder that is missing, so each name is tried in one that is there.
    names = [there / name for name in path.relative_to(there).parts]
    for tried in (path / ("x" * 140), *names):  # the first leaves room for a temporary
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.lstat(tried)


def remove_leftovers(folder: str | Path) -> None:
    """Remove the temporary files and folders in `folder` that processes of this machine left which run no more.

    Nothing else is touched, and what cannot be removed stays.
    """
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(folder)):
            if not entry.is_symlink() and _is_leftover(entry.name):
                if entry.is_dir():
                    remove_tree(Path(entry.path))
                else:
                    with contextlib.suppress(OSError):
                        os.unlink(entry.path)


def _is_leftover(name: str) -> bool:
    match = re.fullmatch(rf"\.simmp-fast-{re.escape(_host())}-(\d{{1,7}})-[0-9a-f]{{12}}-.+", name, re.DOTALL)
    if match is None or name in _live:
        return False
    process = int(match[1])
    return process == os.getpid() or not _is_running(process)  # containers give every start the same number


def is_temporary(name: str) -> bool:
    """Whether a file or folder of this name is a temporary one of this package, of whatever process."""
    return re.fullmatch(r"\.simmp-fast-.+-\d{1,7}-[0-9a-f]{12}-.+", name, re.DOTALL) is not None


def _is_running(pid: int) -> bool:
    if os.name != "posix":
        return True  # signal 0 is no question there: it interrupts
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # somebody else's
    with contextlib.suppress(OSError, IndexError):  # Linux alone has this file
        # "Z": it has ended, and waits for a parent who wants to know, for ever in some containers.
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] != "Z"
    return True


def sync(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk."""
    if path.is_dir() and os.name != "posix":
        return  # other systems cannot open a folder
    # Windows syncs what was opened for writing, and nothing else.
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_tree(folder: Path) -> None:
    """Remove a folder with all that it holds, as far as that is possible, whatever interrupts it."""
    try:
        shutil.rmtree(folder, ignore_errors=True)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name, or make a copy where the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


@contextlib.contextmanager
def new_file(path: str | Path) -> Iterator[Path]:
    """A temporary path to write to, in the folder of `path`, for a caller who renames it afterwards.

    When the block ends well the file is synced and stays; when it does not, it is gone.
    """
    temporary = temporary_name(Path(path))
    try:
        yield temporary
        sync(temporary)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def atomic_file(path: str | Path, *, make_parents: bool = True) -> Iterator[Path]:
    """A temporary path to write to, in the folder of `path`.

    When the block ends well the file is synced and renamed onto `path`; when it does not, `path` is as before and the
    temporary file is gone.

    Args:
        path: the file.
        make_parents: make its folder if it is missing; otherwise that is a `FileNotFoundError`.
    """
    path = Path(path)
    if make_parents:
        path.parent.mkdir(parents=True, exist_ok=True)
    elif not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path.parent))
    with atomic_files(path) as (temporary,):
        yield temporary


@contextlib.contextmanager
def atomic_files(*paths: Path) -> Iterator[list[Path]]:
    """As `atomic_file`, for files of one folder that is there: renamed one by one, once all are on the disk."""
    temporaries = [temporary_name(path) for path in paths]
    try:
        yield temporaries
        for temporary in temporaries:
            sync(temporary)
        for temporary, path in zip(temporaries, paths, strict=True):
            os.replace(temporary, path)
        sync(paths[0].parent)
    finally:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)


def write_json(path: str | Path, content: Any, *, make_parents: bool = True) -> None:
    """Write `content` as indented JSON, atomically."""
    with atomic_file(path, make_parents=make_parents) as temporary:
        temporary.write_bytes(json_bytes(content))


def json_bytes(content: Any) -> bytes:
    """`content` as the indented JSON of a file."""
    text = json.dumps(content, indent=1, ensure_ascii=False)
    # A lone surrogate, such as a byte of a file's name that is not UTF-8, becomes an escape that JSON knows.
    return (text + "\n").encode("utf-8", "backslashreplace")


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
