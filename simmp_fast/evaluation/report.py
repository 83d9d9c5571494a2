"""What an evaluation found: rows per case and class, means, a readable table, CSV and JSON."""

from __future__ import annotations

import csv
import hashlib
import io
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simmp_fast.config import ConfigError, read_json
from simmp_fast.data.errors import DataError, disk_errors, reading
from simmp_fast.evaluation.metrics import METRICS, Measurement
from simmp_fast.evaluation.protocols import Protocol
from simmp_fast.files import atomic_files, check_length, json_bytes, remove_leftovers, sha256

if TYPE_CHECKING:
    from simmp_fast.data.cache import Cache

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
        cache: checksum of the cache.
        weights: what identifies the network's weights, such as their file and its checksum.
    """

    dataset: str
    split: str
    protocol: Protocol
    classes: tuple[str, ...]
    rows: tuple[Row, ...]
    cache: str = ""
    weights: Mapping[str, str] = field(default_factory=dict)

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
            "cache": self.cache,
            "weights": dict(self.weights),
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

    def save(self, folder: str | Path, *, overwrite: bool = False) -> tuple[Path, Path]:
        """Write `<split>_<protocol>.csv` (the rows) and `.json` (the summary), each in one step.

        Both are on the disk before any gets its name. The summary comes last and has the checksum of the rows, so that
        two that do not belong together can be told. In the CSV a name of a case or a class that begins with ``=``,
        ``+``, ``-``, ``@``, a tab or a line break, and so is a formula to a spreadsheet, has an apostrophe (``'``)
        before it.

        Args:
            folder: made if it is missing. Evaluations of other splits and protocols in it stay.
            overwrite: replace results of other data, or of data that nobody knows, too.

        Returns:
            the two paths.

        Raises:
            DataError: such results are there, or the files cannot be written.
        """
        if not overwrite:
            _refuse_others(folder, self.split, self.protocol.name, self.dataset, self.cache)
        table, summary = result_files(folder, self.split, self.protocol.name)
        text = io.StringIO(newline="")
        columns = ["protocol", "split", "case", "label", "class", *Measurement.__dataclass_fields__]
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        for row in self.rows:
            head = {"protocol": self.protocol.name, "split": self.split, "case": _cell(row.case), "label": row.label}
            writer.writerow({**head, "class": _cell(row.name), **asdict(row.score)})
        content = text.getvalue().encode("utf-8", "backslashreplace")
        belongs = {"file": table.name, "sha256": hashlib.sha256(content).hexdigest()}
        with disk_errors(folder):
            remove_leftovers(folder)
            Path(folder).mkdir(parents=True, exist_ok=True)
            with atomic_files(table, summary) as (rows, means):
                rows.write_bytes(content)
                means.write_bytes(json_bytes({**self.summary(), "table": belongs}))
        return table, summary


def _cell(name: str) -> str:
    """A name as a cell that no spreadsheet takes for a formula."""
    return f"'{name}" if name.startswith(("=", "+", "-", "@", "\t", "\r", "\n")) else name


def result_files(folder: str | Path, split: str, protocol: str) -> tuple[Path, Path]:
    """The CSV and the JSON file of an evaluation."""
    base = Path(folder) / f"{split}_{protocol}"
    return base.with_suffix(".csv"), base.with_suffix(".json")


def check_results(folder: str | Path, split: str, protocol: str, cache: Cache) -> Mapping[str, str] | None:
    """Refuse to replace results in `folder` that were measured on other data than `cache`, or nobody knows on which.

    Returns:
        what identifies the weights of the results that are there; None if there are none.

    Raises:
        DataError: such results are there, a table that does not belong to its summary is, or the folder cannot be one.
    """
    found = _refuse_others(folder, split, protocol, cache.name, cache.checksum)
    if found is None:
        return None
    weights = found.get("weights")
    return weights if isinstance(weights, dict) else {}


def _refuse_others(
    folder: str | Path, split: str, protocol: str, dataset: str, checksum: str
) -> Mapping[str, Any] | None:
    """The summary in `folder`, if it is of these data and the table beside it is its own; None if there is neither."""
    check_folder(folder)
    table, summary = result_files(folder, split, protocol)
    instead = "choose another folder (--out), or replace them (--overwrite, in Python overwrite=True)"
    with disk_errors(folder):
        if not os.path.lexists(table) and not os.path.lexists(summary):
            return None
    try:
        found = read_json(summary)
    except ConfigError:
        found = {}
    got = found.get("dataset"), found.get("cache")
    if got != (dataset, checksum):
        measured = f"of {got[0]!r} (cache {str(got[1])[:12]})" if all(got) else "of unknown data"
        raise DataError(
            f"{summary}: got results {measured}, expected none or those of {dataset!r} (cache {checksum[:12]}); "
            f"{instead}"
        )
    belongs = found.get("table")
    with reading(table):
        if isinstance(belongs, dict) and table.exists() and sha256(table) != belongs.get("sha256"):
            raise DataError(
                f"{table}: does not belong to {summary.name}, whose checksum of it differs: an evaluation was ended as "
                f"it wrote them, or one was changed; {instead}"
            )
    return found


def check_folder(folder: str | Path) -> None:
    """Raise `DataError` if files cannot be written to `folder`, which need not exist yet."""
    folder = Path(folder)
    with disk_errors(folder):
        check_length(folder)
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not there.is_dir():
        got = "a link that leads nowhere" if there.is_symlink() and not there.exists() else "a file"
        raise DataError(f"{there}: got {got}, expected a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise DataError(f"{there}: got a folder without permission to write, expected one to write to")


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
