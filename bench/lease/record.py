"""JSON Lines that survive being cut: a line is appended by one write, and a reader skips what was left half-written."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

KNOWN = 4096  # bytes


def append(path: Path, line: dict[str, Any]) -> None:
    """Add one line to a file, at once."""
    text = json.dumps(line, ensure_ascii=False) + "\n"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a file; nothing where it is missing."""
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return
    for line in text.split(b"\n"):
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict):
            yield found


class Mirror:
    """Copies the whole lines that appear in some files to the end of another.

    A file that was replaced by another is copied from its beginning.

    Args:
        target: the file that collects them.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        # How far each file was read, and the last that was read of it, by which its replacement shows.
        self._read: dict[Path, tuple[int, bytes]] = {}

    def take(self, path: Path) -> None:
        """Copy what is new in `path`."""
        start, tail = self._read.get(path, (0, b""))
        try:
            with open(path, "rb") as file:
                file.seek(start - len(tail))
                if file.read(len(tail)) != tail:
                    start, tail = 0, b""
                    file.seek(0)
                new = file.read()
        except FileNotFoundError:
            return
        whole = new[: new.rfind(b"\n") + 1]
        if not whole:
            return
        with open(self.target, "ab") as file:
            file.write(whole)
        self._read[path] = (start + len(whole), (tail + whole)[-KNOWN:])
