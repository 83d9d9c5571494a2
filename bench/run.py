"""A whole run: the machine's ceilings, every selected case, and the files that are written."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from simmp_fast.config import ConfigError

from . import environment, measure, memory, plots, report, roofline
from .backends import BASELINE
from .cases import AROUND, NETWORK, Case
from .measure import Settings
from .rows import RESULTS, Row, write, write_csv, write_jsonl

Progress = Callable[[str], None]


def rows_of(case: Case, settings: Settings) -> Iterator[Row]:
    """The rows of a case, those of one dtype after the other; a dtype that fails takes none of the others with it."""
    # Imported when needed: operators can be measured where timm, or what reads files, is not installed.
    if case.operator in AROUND:
        yield from importlib.import_module("bench.pipeline").MEASURES[case.operator](case, settings)
        return
    single = measure.measure_case
    if case.operator in NETWORK:
        single = importlib.import_module("bench.network").measure_network
    for dtype in settings.dtypes:
        try:
            yield from single(case, dtype, settings)
        except ConfigError:
            raise
        except Exception as error:
            yield _failed(case, measure.dtype_name(dtype), settings, error)
        measure.release(settings.device)


def ready(settings: Settings) -> Settings:
    """`settings` with the ceilings of this machine, measured now, and its description."""
    found = roofline.measure(settings.device, list(settings.dtypes), settings.fast)
    described = environment.describe(settings.device)
    described["bandwidth_gb_s"] = round(found.bandwidth / 1e9, 1)
    for dtype, rate in found.matrix_rate.items():
        described[f"{dtype}_tflop_s"] = round(rate / 1e12, 3)
    return replace(settings, roofline=found, environment=described)


def run(
    cases: Sequence[Case],
    settings: Settings,
    progress: Progress = lambda text: None,
    keep: Callable[[Row], object] = lambda row: None,
) -> list[Row]:
    """Measure the cases one after the other. Where the device fails for good, the cases left are not measured.

    Args:
        cases: from `cases.select`.
        settings: how; the roofline and the environment are filled in here.
        progress: called with the name of each case before it starts.
        keep: called with every row as soon as it is there.
    """
    settings = ready(settings)
    rows: list[Row] = []

    def take(row: Row) -> None:
        rows.append(row)
        keep(row)

    with memory.bounded(settings.device):
        for case in cases:
            progress(case.name)
            try:
                for row in rows_of(case, settings):
                    take(row)
            except ConfigError:
                raise
            except Exception as error:  # a case that cannot even be set up is a row, not the end of the run
                take(_failed(case, measure.dtype_name(settings.dtypes[0]), settings, error))
            measure.release(settings.device)
            if reason := measure.broken(settings.device):
                progress(f"the device can no longer be used, the run ends here: {reason}")
                break
    return rows


def _failed(case: Case, dtype: str, settings: Settings, error: Exception) -> Row:
    row = Row(case.operator, case.group, case.label, case.uses, BASELINE, "forward", dict(case.sizes), dtype)
    row.status, row.message = measure.describe(error)
    row.environment = settings.environment
    return row


def save(folder: Path, rows: Sequence[Row]) -> list[Path]:
    """Write rows, report and pictures; returns the files.

    Args:
        folder: made where it is missing; files of the same names are replaced, each in one step.
        rows: of one run.
    """
    written = [folder / RESULTS, folder / "results.csv"]
    write_jsonl(written[0], rows)
    write_csv(written[1], rows)
    pictures = plots.save_all(folder, rows)
    summary = folder / "report.md"
    write(summary, report.markdown(rows, [path.name for path in pictures]))
    return [*written, summary, *pictures]
