"""What an evaluation found: rows per case and class, means, a readable table, CSV and JSON."""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from simmp_fast.data.files import atomic_file, disk_errors, write_json
from simmp_fast.evaluation.metrics import METRICS, Measurement
from simmp_fast.evaluation.protocols import Protocol

Means = dict[str, float | None]


@dataclass(frozen=True)
class Row:
    """One class in one case.

    Attributes:
        case: case id.
        label: class index, from 1.
        name: class name.
        score: the metrics under the evaluation's protocol; None where undefined.
    """

    case: str
    label: int
    name: str
    score: Measurement


@dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate`. Dice and Jaccard are fractions (0..1), distances in the protocol's unit.

    Attributes:
        dataset: name of the cache.
        split: name of the split.
        protocol: the convention followed.
        classes: class names, background first.
        rows: per case and foreground class, in the order of the split.
    """

    dataset: str
    split: str
    protocol: Protocol
    classes: tuple[str, ...]
    rows: tuple[Row, ...]

    @property
    def cases(self) -> list[str]:
        """Case ids in order."""
        return list(dict.fromkeys(row.case for row in self.rows))

    def case_means(self) -> dict[str, Means]:
        """For each case the mean of each metric over the foreground classes that have one; None where none has."""
        groups: dict[str, list[Row]] = defaultdict(list)
        for row in self.rows:
            groups[row.case].append(row)
        return {case: _means(rows) for case, rows in groups.items()}

    def class_means(self) -> dict[str, Means]:
        """For each foreground class the mean of each metric over the cases that have one; None where none has."""
        return {
            name: _means([row for row in self.rows if row.label == label])
            for label, name in enumerate(self.classes[1:], start=1)
        }

    def means(self) -> Means:
        """The mean of each metric over foreground classes, then over cases; None where nothing is defined."""
        per_case = list(self.case_means().values())
        return {metric: _mean(case[metric] for case in per_case) for metric in METRICS}

    @property
    def undefined_distances(self) -> int:
        """Pairs of case and class present in one of prediction and truth only, so without a distance."""
        return sum(row.score.dice is not None and row.score.hd95 is None for row in self.rows)

    @property
    def absent(self) -> int:
        """Pairs of case and class that the means leave out: in neither prediction nor truth."""
        return sum(row.score.dice is None for row in self.rows)

    def table(self) -> str:
        """Aligned text: a line per metric with the mean and a column per class, headed by what was measured and how."""
        per_class = self.class_means()
        overall = self.means()
        unit = self.protocol.unit
        labels = {"dice": "Dice", "hd95": f"HD95 [{unit}]", "jaccard": "Jaccard", "asd": f"ASD [{unit}]"}
        body = [["", "mean", *per_class]]
        for metric in METRICS:
            values = [overall[metric], *(means[metric] for means in per_class.values())]
            digits = 4 if metric in ("dice", "jaccard") else 2
            body.append([labels[metric], *("-" if v is None else f"{v:.{digits}f}" for v in values)])
        count = len(self.cases)
        lines = [
            f"{self.dataset}, split {self.split}, {count} {'case' if count == 1 else 'cases'}, "
            f"protocol {self.protocol.name}",
            f"({self.protocol.summary})",
            "",
            *_align(body),
        ]
        if self.undefined_distances or self.absent:
            lines += [
                "",
                f"Of {len(self.rows)} pairs of case and class, {self.undefined_distances} have no distance (found in "
                f"one of prediction and truth only), {self.absent} are in neither and left out.",
            ]
        return "\n".join(lines)

    def summary(self) -> dict[str, Any]:
        """Everything but the rows, as plain values for JSON."""
        return {
            "dataset": self.dataset,
            "split": self.split,
            "protocol": self.protocol.name,
            "protocol_summary": self.protocol.summary,
            "distance_unit": self.protocol.unit,
            "cases": len(self.cases),
            "mean": self.means(),
            "per_class": self.class_means(),
            "per_case": self.case_means(),
            "undefined_distances": self.undefined_distances,
            "absent": self.absent,
        }

    def save(self, folder: str | Path) -> tuple[Path, Path]:
        """Write `<split>_<protocol>.csv` (the rows) and `.json` (the summary), each in one step.

        Returns:
            the two paths. Evaluations of other splits and protocols in the same folder stay.

        Raises:
            DataError: the files cannot be written.
        """
        base = Path(folder) / f"{self.split}_{self.protocol.name}"
        table, summary = base.with_suffix(".csv"), base.with_suffix(".json")
        text = io.StringIO(newline="")
        columns = ["protocol", "split", "case", "label", "class", *Measurement.__dataclass_fields__]
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        for row in self.rows:
            head = {"protocol": self.protocol.name, "split": self.split, "case": row.case, "label": row.label}
            writer.writerow({**head, "class": row.name, **asdict(row.score)})
        with disk_errors(folder):
            with atomic_file(table) as temporary:
                temporary.write_text(text.getvalue(), encoding="utf-8")
            write_json(summary, self.summary())
        return table, summary


def _mean(values: Iterable[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def _means(rows: Sequence[Row]) -> Means:
    return {metric: _mean(getattr(row.score, metric) for row in rows) for metric in METRICS}


def _align(body: Sequence[Sequence[str]]) -> list[str]:
    """Rows as text, the first column flush left and the others flush right."""
    widths = [max(len(row[column]) for row in body) for column in range(len(body[0]))]
    return [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
        for row in body
    ]
