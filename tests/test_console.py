"""Messages that are not taken are dropped; results that are not taken are an error, unless their terminal is gone."""

from __future__ import annotations

import errno
import io
import os
import pty
from pathlib import Path

import pytest
from tqdm import tqdm

from simmp_fast.console import Console, Escaped, OutputError


class Refusing(io.StringIO):
    """A stream that takes nothing."""

    def __init__(self, code: int, terminal: bool = False) -> None:
        super().__init__()
        self.code, self.terminal = code, terminal

    def isatty(self) -> bool:
        return self.terminal

    def write(self, text: str) -> int:
        raise OSError(self.code, os.strerror(self.code))


def test_messages_arrive() -> None:
    stream = io.StringIO()
    assert Console(stream).write("one\n") == 4
    print("two", file=Console(stream))
    assert stream.getvalue() == "one\ntwo\n"
    assert not Console(stream).isatty()


@pytest.mark.parametrize("code", [errno.EIO, errno.EPIPE, errno.ENOSPC, errno.EAGAIN])
def test_messages_that_are_not_taken_are_dropped(code: int) -> None:
    console = Console(Refusing(code, terminal=True))
    print("lost", file=console)
    with tqdm(total=2, file=console) as bar:
        bar.update()
        tqdm.write("lost", file=console)
    console.flush()


def test_no_stream_takes_nothing() -> None:
    for console in (Console(None), Console(closed())):
        print("lost", file=console)
        assert not console.isatty()


def closed() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_what_was_not_taken_is_not_tried_again(tmp_path: Path) -> None:
    """Or Python would try, fail, and end with status 120."""
    number = os.open("/dev/full", os.O_WRONLY)
    stream = os.fdopen(number, "w", buffering=1)
    print("lost", file=Console(stream))
    other = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT)
    os.dup2(other, number)  # the disk takes something again
    print("kept", file=Console(stream))
    stream.close()
    os.close(other)
    assert (tmp_path / "log").read_text() == "kept\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_results_that_nothing_depends_on_are_dropped_too() -> None:
    with open("/dev/full", "w") as full:
        print("lost", file=Console(Escaped(full)))


def test_results_are_escaped_and_an_error_where_they_are_not_taken() -> None:
    stream = io.StringIO()
    print("a\x1b[2Jb", "c", sep="\n", file=Escaped(stream))
    assert stream.getvalue() == "a\\x1b[2Jb\nc\n"
    with pytest.raises(OutputError, match=r"^standard output: cannot be written \(No space left on device\)$"):
        Escaped(Refusing(errno.ENOSPC, terminal=True)).write("x")
    with pytest.raises(OutputError, match="Input/output error"):
        Escaped(Refusing(errno.EIO)).write("x")
    with pytest.raises(BrokenPipeError):
        Escaped(Refusing(errno.EPIPE)).write("x")
    assert Escaped(Refusing(errno.EIO, terminal=True)).write("x") == 1


def test_a_terminal_that_is_closed_takes_results_no_more_and_ends_nothing() -> None:
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as stream:
        output, console = Escaped(stream), Console(stream)
        assert console.isatty()
        os.close(ours)
        print("lost", file=output, flush=True)
        print("lost", file=console)
