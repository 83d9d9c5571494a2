"""Data sets by name: one line here for each that the program knows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from simmp_fast.config import ConfigError
from simmp_fast.data.demo import DemoSource
from simmp_fast.data.folder import FolderSource
from simmp_fast.data.sources import Source

SOURCES: dict[str, Callable[[], Source]] = {"demo": DemoSource}


def open_source(name: str | Path) -> Source:
    """The data set `name`: one of `SOURCES`, or the path of a YAML file that describes your own.

    Raises:
        ConfigError: an unknown name, or a YAML file that cannot be used.
        DataError: its files are not there.
    """
    if str(name) in SOURCES:
        return SOURCES[str(name)]()
    if Path(name).suffix.lower() in (".yaml", ".yml"):
        return FolderSource(name)
    known = ", ".join(sorted(SOURCES))
    raise ConfigError(f"data set: got {str(name)!r}, expected one of {known}, or the path of a .yaml file")
