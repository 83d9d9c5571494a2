"""All scenarios by name, and operations with a planted defect that the harness must see."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import ModuleType

import fault_results
import fault_training
from fault_harness import Scenario

from simmp_fast.data.errors import DataError


class _Planted(Scenario):
    def fill(self, place: Path) -> None:
        (place / "file").write_text("old " * 100)


class InPlace(_Planted):
    """Empties the file and writes it anew."""

    name = "planted: in place"

    def operate(self, place: Path) -> None:
        (place / "file").write_text("new " * 100)


class Silent(_Planted):
    """Says that all is well when it is not."""

    name = "planted: silent"

    def operate(self, place: Path) -> None:
        with contextlib.suppress(OSError):
            (place / ".new").write_text("new " * 100)
            (place / ".new").replace(place / "file")


class Nameless(_Planted):
    """Its error is not one for users."""

    name = "planted: nameless"

    def operate(self, place: Path) -> None:
        try:
            (place / ".new").write_text("new " * 100)
        except OSError as error:
            (place / ".new").unlink(missing_ok=True)
            raise RuntimeError("oh") from error
        (place / ".new").replace(place / "file")


class Untidy(_Planted):
    """Whole old or whole new, but each time under another temporary name that stays."""

    name = "planted: untidy"

    def operate(self, place: Path) -> None:
        free = next(path for i in range(99) if not (path := place / f".new{i}").exists())
        free.write_text("new " * 100)
        free.replace(place / "file")


class Greedy(_Planted):
    """Removes more than its own when it fails."""

    name = "planted: greedy"

    def operate(self, place: Path) -> None:
        try:
            (place / ".new").write_text("new " * 100)
            (place / ".new").replace(place / "file")
        except OSError as error:
            for path in place.glob(".*"):
                path.unlink()
            raise DataError(f"{place / 'file'}: cannot be written") from error


def _named(module: ModuleType) -> dict[str, type[Scenario]]:
    kinds = [kind for kind in vars(module).values() if isinstance(kind, type) and issubclass(kind, Scenario)]
    return {kind.name: kind for kind in kinds if kind.name and kind.__module__ == module.__name__}


PLANTED = {kind.name: kind for kind in (InPlace, Silent, Nameless, Untidy, Greedy)}
SCENARIOS = {**_named(fault_training), **_named(fault_results)}
