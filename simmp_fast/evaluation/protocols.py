"""The two conventions under which numbers are reported; every table names the one it follows.

`published` is the convention of the published tables: distances in voxels, and where a mask is empty a fixed score.
`strict` measures in millimetres (where the files state no spacing in voxels, and says so) and invents nothing: a class
absent from prediction and truth is left out of the mean; absent from one of them it scores Dice 0, and its distances
are undefined, which is counted and reported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from simmp_fast.evaluation.metrics import Labels, Measurement, measure_classes
from simmp_fast.validation import check_choice


def _published(raw: Measurement) -> Measurement:
    if raw.predicted == 0:
        return replace(raw, dice=0.0, hd95=0.0, jaccard=0.0, asd=0.0)
    if raw.true == 0:
        return replace(raw, dice=1.0, hd95=0.0, jaccard=1.0, asd=0.0)
    return raw


def _strict(raw: Measurement) -> Measurement:
    return raw


@dataclass(frozen=True)
class Protocol:
    """A convention.

    Attributes:
        name: as tables print it.
        unit: unit of the distances, "voxel" or "mm".
        distances: what tables say of it.
        masks: what tables say of the treatment of empty masks.
        empties: scores a measurement, deciding what an empty mask is worth.
    """

    name: str
    unit: str
    distances: str
    masks: str
    empties: Callable[[Measurement], Measurement]

    @property
    def summary(self) -> str:
        """One line for tables: units and the treatment of empty masks."""
        return f"distances in {self.distances}; {self.masks}"

    def in_voxels(self) -> Protocol:
        """This convention for files that state no spacing."""
        return replace(self, unit="voxel", distances="voxels, as the files state no spacing")

    def score(
        self, prediction: Labels, truth: Labels, classes: int, spacing: Sequence[float] | None
    ) -> list[Measurement]:
        """Score every foreground class of a case.

        Args:
            prediction: labels, integer, any number of dimensions.
            truth: the same, same shape.
            classes: number of classes, background included.
            spacing: voxel size along each axis in mm; "strict" needs it, "published" measures in voxels.

        Raises:
            ValueError: shapes, labels or spacing that do not fit.
        """
        if self.unit == "mm" and spacing is None:
            raise ValueError(f"spacing: got None, expected the voxel size in mm (protocol {self.name!r})")
        raw = measure_classes(prediction, truth, classes, spacing if self.unit == "mm" else None)
        return [self.empties(measurement) for measurement in raw]


PROTOCOLS: dict[str, Protocol] = {
    "published": Protocol(
        "published",
        "voxel",
        "voxels",
        "empty prediction scores 0 0 0 0, empty truth alone 1 0 1 0",
        _published,
    ),
    "strict": Protocol(
        "strict",
        "mm",
        "mm",
        "a class absent from both is left out, absent from one has Dice 0 and no distance",
        _strict,
    ),
}


def get_protocol(name: str) -> Protocol:
    """The protocol `name`; raises `ValueError` that lists the protocols there are."""
    check_choice("protocol", name, tuple(PROTOCOLS))
    return PROTOCOLS[name]
