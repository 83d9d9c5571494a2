"""What goes to a terminal: progress that nothing may depend on, and text in which names cannot steer the terminal."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from typing import Any, TextIO

from simmp_fast.messages import printable


class Console:
    """A stream for progress and messages: what it does not take, because the terminal was closed say, is dropped.

    Args:
        stream: standard error, as a rule; None, as where it was closed before Python started, takes nothing.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write `text` at once, or drop it; its length."""
        with self._dropping():
            if self._stream is not None:
                self._stream.write(text)
                self._stream.flush()
        return len(text)

    def flush(self) -> None:
        """Nothing: all was written at once."""

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        with contextlib.suppress(OSError, ValueError):
            return self._stream is not None and self._stream.isatty()
        return False

    @contextlib.contextmanager
    def _dropping(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, OutputError):  # a ValueError: it was closed
            drop_buffered(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class OutputError(Exception):
    """Standard output takes no more."""


class Escaped:
    """A stream for results: control characters but line ends are escaped, so that no name in them steers a terminal.

    A terminal that was closed takes nothing; any other output that takes nothing is an error.

    Args:
        stream: standard output, as a rule.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._terminal = stream, Console(stream).isatty()

    def write(self, text: str) -> int:
        """Write `text`; its length.

        Raises:
            BrokenPipeError: nobody reads it.
            OutputError: it cannot be written, to a full disk say.
        """
        with self._explained():
            self._stream.write(printable(text))
        return len(text)

    def flush(self) -> None:
        """Write what is held back; raises as `write` does."""
        with self._explained():
            self._stream.flush()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            raise
        except OSError as error:
            if not (self._terminal and error.errno == errno.EIO):
                raise OutputError(f"standard output: cannot be written ({error.strerror or error})") from error
            drop_buffered(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def drop_buffered(stream: Any) -> None:
    """Let go of what `stream` could not write and still holds: it would be tried again, and fail, as Python ends."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # a stand-in may have no file, or be none
        number = stream.fileno()
        kept, nowhere = os.dup(number), os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, number)
            stream.flush()
        finally:
            os.dup2(kept, number)
            os.close(kept)
            os.close(nowhere)
