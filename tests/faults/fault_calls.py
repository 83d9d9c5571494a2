"""The calls that are spoiled, and how: the Python side of `shim.c`."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).absolute().parent
TESTS = HERE.parent

# The kinds of calls, numbered as in shim.c.
CREATE, WRITE, SYNC, NAME, REMOVE, SIZE, MODE, CLOSE, OPEN, READ = (1 << bit for bit in range(10))
CHANGES = CREATE | WRITE | SYNC | NAME | REMOVE | SIZE | MODE
KILL, TEAR, FAIL, FULL, SHORT, SIGNAL, SIGNAL_TWICE = range(1, 8)


@dataclass(frozen=True)
class Action:
    """What happens at the n-th call.

    Attributes:
        what: one of the numbers above.
        kinds: the calls that count.
        argument: the error number of a failure, or the number of a signal.
        dies: whether the process is killed.
        tidy: whether nothing temporary may be left once the failure was reported.
        meaning: for the report.
    """

    what: int
    kinds: int
    argument: int = 0
    dies: bool = False
    tidy: bool = False
    meaning: str = ""


ACTIONS = {
    "kill": Action(KILL, CHANGES, dies=True, meaning="SIGKILL before the call"),
    "torn": Action(TEAR, WRITE, dies=True, meaning="half of the bytes of a write, then SIGKILL"),
    "eio": Action(FAIL, CHANGES | CLOSE | OPEN | READ, errno.EIO, meaning="the call fails with EIO, reads too"),
    "enospc": Action(
        FAIL, CREATE | WRITE | SYNC | NAME | SIZE, errno.ENOSPC, tidy=True, meaning="the call fails with ENOSPC"
    ),
    "full": Action(
        FULL, CREATE | WRITE | SIZE, errno.ENOSPC, tidy=True, meaning="half of a write, and ENOSPC from then on"
    ),
    "short": Action(SHORT, WRITE, meaning="a write takes half of its bytes and says so"),
    "int": Action(SIGNAL, CHANGES | CLOSE | OPEN, signal.SIGINT, tidy=True, meaning="Ctrl-C"),
    "int2": Action(
        SIGNAL_TWICE, CHANGES | CLOSE | OPEN, signal.SIGINT, meaning="Ctrl-C, and again at the call after it"
    ),
    "term": Action(SIGNAL, CHANGES | CLOSE | OPEN, signal.SIGTERM, tidy=True, meaning="SIGTERM"),
}


def compiler() -> str | None:
    """The C compiler, where there is one and the system is Linux."""
    return shutil.which("cc") if sys.platform == "linux" else None


def compiled_shim() -> Path:
    """The shared library, compiled once for each state of its source and kept in a temporary folder."""
    source = HERE / "shim.c"
    digest = hashlib.sha256(source.read_bytes()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"simmp-fast-faults-{os.getuid()}"
    library = folder / f"shim-{digest}.so"
    if not library.exists():
        folder.mkdir(mode=0o700, exist_ok=True)
        fresh = library.with_suffix(f".{os.getpid()}")
        command = [str(compiler()), "-shared", "-fPIC", "-O1", "-o", str(fresh), str(source), "-ldl"]
        subprocess.run(command, check=True)
        fresh.replace(library)
    return library


def preloaded_environment() -> dict[str, str]:
    """What a process needs that is to be spoiled: the library, the tests' helpers, one thread."""
    paths = [TESTS.parent, HERE, TESTS, TESTS / "training", TESTS / "evaluation", TESTS / "data"]
    return {
        **os.environ,
        "LD_PRELOAD": str(compiled_shim()),
        "PYTHONPATH": ":".join(map(str, paths)),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }


class Calls:
    """The library in this process, which must have been started with it."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(os.environ["LD_PRELOAD"])
        self._library.faults_arm.argtypes = [ctypes.c_char_p, ctypes.c_long, *[ctypes.c_int] * 3]
        self._library.faults_count.restype = ctypes.c_long
        self._library.faults_record.restype = ctypes.c_char_p

    def arm(self, folder: Path, number: int, action: Action) -> None:
        """Spoil the `number`-th call (from 1) below `folder`; with 0 count and record only."""
        self._library.faults_arm(os.fsencode(folder), number, action.what, action.kinds, action.argument)

    def disarm(self) -> None:
        """Count nothing any more."""
        self._library.faults_arm(b"", 0, 0, 0, 0)

    def count(self) -> int:
        """Calls counted since `arm`."""
        return int(self._library.faults_count())

    def struck(self) -> bool:
        """Whether the call was reached."""
        return bool(self._library.faults_struck())

    def record(self) -> list[str]:
        """A line for each call that was counted with `number` 0."""
        return str(self._library.faults_record().decode(errors="replace")).splitlines()
