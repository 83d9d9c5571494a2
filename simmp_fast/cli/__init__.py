"""The command line: ``simmp-fast <command>``, one file a command."""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from simmp_fast import __version__
from simmp_fast.cli import bench, convert, demo, evaluate, info, predict, prepare, train

COMMANDS = (prepare, train, evaluate, predict, convert, info, demo, bench)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_BROKEN_PIPE = 128 + 13  # SIGPIPE, which Windows does not have


class Terminated(BaseException):
    """A signal asks the process to end; like an interrupt, it passes all handlers of errors.

    Attributes:
        status: the exit status, 128 and the signal's number.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"signal {number}")
        self.status = 128 + number


class _OutputError(Exception):
    """Standard output takes no more."""


def build_parser() -> argparse.ArgumentParser:
    """The parser with all commands."""
    parser = argparse.ArgumentParser(
        prog="simmp-fast",
        description="Sim-MPNet for medical image segmentation: prepare data, train, evaluate, predict.",
        epilog="simmp-fast COMMAND --help says more about each, with an example.",
    )
    parser.add_argument("--version", action="version", version=f"simmp-fast {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")
    for module in COMMANDS:
        module.register(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 if it worked, 1 if training stopped on an error or memory ran out, 2 for input that cannot be used or a file
        or output that cannot be written, and 128 and the signal's number if a signal ended it or would have: nobody
        reads the output any more (SIGPIPE).
    """
    _make_streams_safe()
    try:
        try:
            return _command(argv)
        finally:
            _flush()  # an error at the interpreter's end could not be explained
    except BrokenPipeError:
        return _BROKEN_PIPE
    except _OutputError as error:
        print(f"simmp-fast: {error}", file=sys.stderr)
        return 2


def _command(argv: Sequence[str] | None) -> int:
    arguments = build_parser().parse_args(argv)
    try:
        with _terminating():
            return int(arguments.run(arguments) or 0)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Terminated as request:
        print("terminated", file=sys.stderr)
        return request.status
    except Exception as error:
        answer = _explained(error)
        if answer is None:
            raise
        message, status = answer
        print(f"simmp-fast {arguments.command}: {message}", file=sys.stderr)
        return status


def _make_streams_safe() -> None:
    """No name that a terminal cannot show ends a command, nor does a stream that was closed before it started."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - open until the process ends
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _flush() -> None:
    """Write what standard output still holds; what it refuses goes nowhere.

    Raises:
        BrokenPipeError: nobody reads it.
        _OutputError: it cannot be written, to a full disk say.
    """
    try:
        sys.stdout.flush()
    except OSError as error:
        with contextlib.suppress(OSError, ValueError):  # a stand-in may have no file
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)
        if isinstance(error, BrokenPipeError):
            raise
        raise _OutputError(f"standard output: cannot be written ({error.strerror or error})") from error


@contextmanager
def _terminating() -> Iterator[None]:
    """Inside the block SIGTERM and SIGHUP raise `Terminated`, so that nothing temporary is left behind.

    Only the main thread can receive signals, and one that is ignored (`nohup`) stays so. Where a command has handlers
    of its own, as training has, these win.
    """
    names = ("SIGTERM", "SIGHUP") if threading.current_thread() is threading.main_thread() else ()
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    taken = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]

    def receive(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)  # a second one would disturb the cleaning up
        raise Terminated(number)

    for number in taken:
        signal.signal(number, receive)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def _explained(error: Exception) -> tuple[str, int] | None:
    """Message and exit status of an error that a sentence explains; None for one that needs its traceback."""
    from simmp_fast.config import ConfigError
    from simmp_fast.data.errors import DataError
    from simmp_fast.evaluation.inference import memory_shortage
    from simmp_fast.ops import BackendError
    from simmp_fast.training.errors import TrainingError

    if isinstance(error, (ConfigError, DataError, BackendError)):
        return str(error), 2
    if isinstance(error, TrainingError):
        return str(error), 1
    if isinstance(error, OSError) and (error.filename is not None or error.errno in _FULL):
        return f"{error.filename or 'the output'}: {error.strerror or error}", 2
    shortage = memory_shortage(error)
    return None if shortage is None else (f"{shortage}; a smaller batch may fit", 1)
