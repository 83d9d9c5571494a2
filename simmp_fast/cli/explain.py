"""Errors in a sentence, as far as one can explain them."""

from __future__ import annotations

import errno
import os
import traceback
from pathlib import Path

from simmp_fast.messages import escaped, memory_shortage, one_line, shown

_PACKAGE = Path(__file__).parents[1]
_WAYS_OUT = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space, or ask for more",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "close other programs: the system has too many open files",
    errno.EAGAIN: "raise the limit on processes (ulimit -u), or close other programs",
    errno.EACCES: "change its permissions",
    errno.EPERM: "change its permissions",
    errno.EROFS: "choose a place that can be written",
    errno.EIO: "check the disk or the connection to it",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOENT: "check its name and that nothing removed it",
    errno.EEXIST: "move it away, or choose another name",
}


def explained(error: Exception) -> tuple[str, int] | None:
    """Message and exit status of an error that a sentence explains; None for one that needs its traceback."""
    from simmp_fast.data.errors import DataError
    from simmp_fast.documents import ConfigError

    if isinstance(error, (ConfigError, DataError)):
        return str(error), 2
    if isinstance(error, OSError) and error.errno != errno.ENOMEM:
        return _os_error(error), 2
    if isinstance(error, UnicodeEncodeError):
        what = f"{shown(error.object)}: cannot be written as {error.encoding}"
        return f"{what}; run the command with PYTHONUTF8=1 or in a locale of UTF-8", 2
    if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        return f"no thread can be started; {_WAYS_OUT[errno.EAGAIN]}", 1
    shortage = f"not enough memory ({error})" if isinstance(error, OSError) else memory_shortage(error)
    # What follows imports more, and has to wait: there may be no memory left for that.
    if not isinstance(error, (MemoryError, OSError)):
        from simmp_fast.ops import BackendError
        from simmp_fast.training.errors import TrainingError

        if isinstance(error, BackendError):
            return str(error), 2
        if isinstance(error, TrainingError):
            return str(error), 1
    return None if shortage is None else (f"{shortage}; a smaller batch may fit", 1)


def _os_error(error: OSError) -> str:
    names = [escaped(os.fsdecode(name)) for name in (error.filename, error.filename2) if isinstance(name, (str, bytes))]
    what = " -> ".join(names) or f"a file or a connection, in {_place(error)}"
    way_out = _WAYS_OUT.get(error.errno or 0, "mend that")
    return (
        f"{what}: {error.strerror or one_line(str(error)) or type(error).__name__}; {way_out} and run the command again"
    )


def _place(error: Exception) -> str:
    """The innermost line of this package that met `error`."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if _PACKAGE in Path(frame.filename).parents]
    if not ours:
        return "the program"
    return f"{Path(ours[-1].filename).relative_to(_PACKAGE.parent)}, line {ours[-1].lineno}"
