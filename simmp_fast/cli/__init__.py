"""The command line: ``simmp-fast <command>``, one file a command."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import platform
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from tqdm import tqdm

from simmp_fast import __version__
from simmp_fast.cli import bench, convert, demo, evaluate, info, predict, prepare, train
from simmp_fast.cli.explain import explained
from simmp_fast.console import Console, Escaped, OutputError, drop_buffered
from simmp_fast.messages import Note, one_line, printable
from simmp_fast.signals import STOP_SIGNALS

COMMANDS = (prepare, train, evaluate, predict, convert, info, demo, bench)
_BROKEN_PIPE = 128 + 13  # SIGPIPE, which Windows does not have


class Terminated(BaseException):
    """A signal asks the process to end; like an interrupt, it passes all handlers of errors.

    Attributes:
        status: the exit status, 128 and the signal's number.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"signal {number}")
        self.status = 128 + number


class _Parser(argparse.ArgumentParser):
    """Its errors are one line, whatever was given."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, and exit with 2."""
        super().error(one_line(message))


def build_parser() -> argparse.ArgumentParser:
    """The parser with all commands."""
    parser = _Parser(
        prog="simmp-fast",
        description="Sim-MPNet for medical image segmentation: prepare data, train, evaluate, predict.",
        epilog="simmp-fast COMMAND --help says more about each, with an example. Exit status: 0 done; 1 training "
        "stopped on an error, memory ran out, or a defect of the program; 2 arguments, files or an output that cannot "
        "be used; 130 interrupted (train: saved, --resume goes on); 129, 141, 143: ended by SIGHUP, SIGPIPE, SIGTERM.",
    )
    parser.add_argument("--version", action="version", version=f"simmp-fast {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")
    for module in COMMANDS:
        module.register(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 if it worked, 1 if training stopped on an error, memory ran out or the program has a defect, 2 for input that
        cannot be used or a file or output that cannot be written, and 128 and the signal's number if a signal ended it
        or would have: nobody reads the output any more (SIGPIPE).
    """
    with _safe_streams():
        output = Escaped(sys.stdout)
        try:
            try:
                return _command(argv, output)
            finally:
                output.flush()  # an error at the interpreter's end could not be explained
        except BrokenPipeError:
            drop_buffered(sys.stdout)
            return _BROKEN_PIPE
        except OutputError as error:
            drop_buffered(sys.stdout)
            _say(f"simmp-fast: {error}")
            return 2


def _command(argv: Sequence[str] | None, output: Any) -> int:
    arguments = build_parser().parse_args(argv)
    name = f"simmp-fast {arguments.command}"
    try:
        with _terminating(), _notes(name), contextlib.redirect_stdout(output):
            return int(arguments.run(arguments) or 0)
    except KeyboardInterrupt:
        _say("interrupted")
        return 130
    except Terminated as request:
        _say("terminated")
        return request.status
    except (BrokenPipeError, OutputError):
        raise
    except Exception as error:
        answer = explained(error)
        if answer is not None:
            message, status = answer
            _say(f"{name}: {message}")
            return status
        traceback.print_exc(file=sys.stderr)
        _say(
            f"{name}: this is a defect of the program. Please report it to its authors with the lines above, the whole "
            f"command and this: simmp_fast {__version__}, {_versions()}"
        )
        return 1


def _versions() -> str:
    import torch

    return f"torch {torch.__version__}, Python {platform.python_version()}, {platform.platform()}"


def _say(message: str) -> None:
    tqdm.write(printable(message), file=sys.stderr)  # above a progress bar


@contextmanager
def _safe_streams() -> Iterator[None]:
    """No name that a terminal cannot show ends a command, nor does standard error that takes nothing."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed before Python started; files that are opened must not get its number
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - open until the process ends
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    with contextlib.redirect_stderr(Console(sys.stderr)):
        yield


@contextmanager
def _notes(name: str) -> Iterator[None]:
    """Within the block a `Note` is printed as one line, each time it is given; other warnings are as always."""
    with warnings.catch_warnings():
        plain = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
            if issubclass(category, Note):
                _say(f"{name}: note: {message}")
            else:
                plain(message, category, *place, **more)

        warnings.showwarning = show
        warnings.simplefilter("always", Note)
        yield


@contextmanager
def _terminating() -> Iterator[None]:
    """Inside the block SIGTERM and SIGHUP raise `Terminated`, so that nothing temporary is left behind.

    Only the main thread can receive signals, and one that is ignored (`nohup`) stays so. Where a command has handlers
    of its own, as training has, these win.
    """
    numbers = set(STOP_SIGNALS) - {signal.SIGINT} if threading.current_thread() is threading.main_thread() else ()
    taken = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]

    def receive(number: int, frame: FrameType | None) -> None:
        for other in taken:
            signal.signal(other, signal.SIG_IGN)  # a second one, of either kind, would disturb the cleaning up
        raise Terminated(number)

    for number in taken:
        signal.signal(number, receive)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)
