"""What messages hold: values and names as a terminal can show them, and why a path is no file to read."""

from __future__ import annotations

import os
import re
import reprlib
import stat
from pathlib import Path

# Control characters, separators of lines, and marks that turn the direction of writing: a terminal obeys them.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")

_short = reprlib.Repr()
_short.maxlevel, _short.maxstring, _short.maxother = 3, 200, 200
_short.maxdict = _short.maxlist = _short.maxtuple = 12


_SHORTAGE = "not enough memory"
# What the RuntimeErrors of PyTorch's allocators say.
_NO_MEMORY = (_SHORTAGE, "DefaultCPUAllocator", "can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def shown(value: object) -> str:
    """A value as messages show it: its `repr`, cut where it is long."""
    try:
        return _short.repr(value)
    except ValueError:  # Python refuses to write out an int of thousands of digits
        return f"a value of type {type(value).__name__} that is too long to show"


def escaped(text: str) -> str:
    r"""`text` on one line that can be printed and stored.

    Control characters and what turns the direction of writing become escapes such as ``\x1b``, and so does each byte of
    a file's name that is not UTF-8.
    """
    text = re.sub("[\udc80-\udcff]", lambda byte: f"\\x{ord(byte[0]) - 0xDC00:x}", text)
    text = _CONTROL.sub(lambda character: character[0].encode("unicode_escape").decode(), text)
    return text.encode("utf-8", "backslashreplace").decode()


def printable(text: str) -> str:
    """A message, `escaped` but for its line breaks."""
    return "\n".join(map(escaped, text.split("\n")))


def has_control(text: str) -> bool:
    """Whether `text` holds characters that a terminal obeys instead of showing them."""
    return _CONTROL.search(text) is not None


def one_line(text: str, limit: int = 300) -> str:
    """`text` folded into one line of at most `limit` characters, without its middle where it is longer."""
    line = escaped(" ".join(text.split()))
    return line if len(line) <= limit else f"{line[: limit * 2 // 3]} ... {line[5 - limit // 3 :]}"


def why_no_file(path: str | Path) -> str | None:
    """Why nothing can be read from `path`, in words that follow its name; None where it is a file.

    Nothing is opened: a pipe would wait for ever.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        if os.path.islink(path):
            return f"a link to {escaped(os.readlink(path))}, which is not there"
        return "no such file"
    except ValueError:
        return "no such file (its name holds a zero byte)"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if stat.S_ISREG(mode):
        return None
    return "got a folder, expected a file" if stat.S_ISDIR(mode) else "got a pipe or a device, expected a file"


def memory_shortage(error: BaseException) -> str | None:
    """In a sentence, that memory ran out, if that is what `error` says; None for any other error."""
    text = str(error)
    if isinstance(error, MemoryError):
        if _SHORTAGE in text:
            return text  # it was made here
    elif not isinstance(error, RuntimeError) or not any(part in text for part in _NO_MEMORY):
        return None
    reason = text.splitlines()[0] if text else type(error).__name__
    return f"{_SHORTAGE} ({reason})"


class Note(UserWarning):
    """What is worth knowing of a file that can be used all the same; the command line shows it as a line."""
