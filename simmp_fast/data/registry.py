"""Data sets by name: one line here for each that the program knows."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from simmp_fast.config import ConfigError
from simmp_fast.data.acdc import acdc
from simmp_fast.data.demo import DemoSource
from simmp_fast.data.errors import reading, refuse_other_than_utf8
from simmp_fast.data.folder import FolderSource
from simmp_fast.data.isic2018 import isic2018
from simmp_fast.data.segpc2021 import segpc2021
from simmp_fast.data.sources import Source
from simmp_fast.data.synapse import synapse
from simmp_fast.messages import shown

SOURCES: dict[str, Callable[[], Source]] = {"demo": DemoSource}
# Data sets that are downloaded elsewhere: each takes the folder of the download.
DOWNLOADS: dict[str, Callable[[Path], Source]] = {
    "acdc": acdc,
    "isic2018": isic2018,
    "segpc2021": segpc2021,
    "synapse": synapse,
}


def open_source(name: str | Path, folder: str | Path | None = None, split: str | None = None) -> Source:
    """The data set `name`: one of `SOURCES` or `DOWNLOADS`, or the path of a YAML file that describes your own.

    Args:
        name: of the data set.
        folder: of the download; for `DOWNLOADS`, and only for them.
        split: for "acdc", of which several are in use.

    Raises:
        ConfigError: an unknown name, a folder or split that is missing or makes no sense, or a YAML file that cannot be
            used.
        DataError: its files are not there or cannot be read, or a name is not UTF-8.
    """
    key = str(name)
    if split is not None and key != "acdc":
        raise ConfigError(f"split: got {split!r}, expected none: only 'acdc' has several splits to choose from")
    if key in DOWNLOADS:
        if folder is None:
            raise ConfigError(f"source: missing, expected the folder of the {key} download (--source)")
        refuse_other_than_utf8(folder)
        with reading(folder):
            return acdc(Path(folder), split) if split is not None else DOWNLOADS[key](Path(folder))
    if folder is not None:
        raise ConfigError(f"source: got {str(folder)!r}, expected none: only {', '.join(DOWNLOADS)} take a folder")
    if key in SOURCES:
        return SOURCES[key]()
    if Path(name).suffix.lower() in (".yaml", ".yml"):
        return FolderSource(name)
    known = ", ".join(sorted((*SOURCES, *DOWNLOADS)))
    what = "a folder, " if os.path.isdir(name) else ""
    raise ConfigError(f"data set: got {shown(key)}, {what}expected one of {known}, or the path of a .yaml file")
