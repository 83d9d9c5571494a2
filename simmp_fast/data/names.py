"""Names of files and cases: how they are compared, and how they are shown."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

from simmp_fast.messages import escaped, has_control, printable

NOT_UTF8 = "its name is not UTF-8, expected one that is: rename it"
CONTROL = "its name holds control characters, expected none: rename it"
_LISTED, _REPORTED = 8, 20


def nfc(text: str) -> str:
    """`text` in composed Unicode: names that read alike are equal in it, however a system stores their accents."""
    return unicodedata.normalize("NFC", text)


def forms(text: str) -> list[str]:
    """`text` as written, composed and decomposed: the names that a file which reads like it may have on a disk."""
    return list(dict.fromkeys((text, nfc(text), unicodedata.normalize("NFD", text))))


def is_utf8(path: str | Path) -> bool:
    """Whether every name in `path` is UTF-8: others can be neither printed nor written to JSON."""
    return str(path).encode("utf-8", "replace") == str(path).encode("utf-8", "surrogatepass")


def name_problem(path: str | Path) -> str | None:
    """Why the names in `path` can be neither printed nor kept, or None."""
    if not is_utf8(path):
        return NOT_UTF8
    return CONTROL if has_control(str(path)) else None


def listed(names: Iterable[str]) -> str:
    """The first few of `names`, and how many there are if there are more."""
    every = [escaped(name) for name in names]
    return ", ".join(every[:_LISTED]) + (f", ... ({len(every)} names)" if len(every) > _LISTED else "")


def report(heading: str, names: Sequence[str]) -> str:
    """`heading`, and under it the first of many names, one a line, printable, and how many more there are."""
    lines = [f"  {escaped(name)}" for name in names[:_REPORTED]]
    more = [f"  ... and {len(names) - len(lines)} more"] if len(names) > len(lines) else []
    return printable("\n".join([heading, *lines, *more]))
