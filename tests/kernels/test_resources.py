"""The committed report of compiled resources: complete, clean, and true for a covering subset compiled here."""

from __future__ import annotations

import os

import pytest

triton = pytest.importorskip("triton")

from simmp_fast.kernels.aot import Case, faults, plan  # noqa: E402
from simmp_fast.kernels.compile import (  # noqa: E402
    compile_cases,
    is_current,
    line,
    load_kernels,
    parse,
    read_report,
    version_line,
)

load_kernels()
CASES = list(plan())
VERSION, LINES = read_report()
REGENERATE = "python -m simmp_fast.kernels.compile"

pytestmark = [
    pytest.mark.skipif(triton.knobs.runtime.interpret, reason="interpreted kernels are not compiled"),
    pytest.mark.skipif(VERSION not in ("", version_line()), reason=f"the report is of {VERSION}, not of this compiler"),
]


def covering() -> list[Case]:
    """For each kernel one case, targets and dtypes in turn, so that every target and every dtype is met."""
    kernels = list(dict.fromkeys(case.kernel for case in CASES))
    chosen = []
    for i, kernel in enumerate(kernels):
        own = [case for case in CASES if case.kernel == kernel and case.dtype in ("bfloat16", "float16")]
        own = own or [case for case in CASES if case.kernel == kernel]
        smallest = min(case.config.width for case in own)
        own = [case for case in own if case.config.width == smallest]
        chosen.append(own[(7 * i) % len(own)])
    return chosen


def test_the_report_is_current() -> None:
    stale = [case.label for case in CASES if not is_current(case, LINES.get(case.label))]
    assert not stale, f"{len(stale)} of {len(CASES)} cases are stale, first {stale[:5]}; run: {REGENERATE}"
    gone = set(LINES) - {case.label for case in CASES}
    assert not gone, f"the report has cases that the table has not: {sorted(gone)[:5]}; run: {REGENERATE}"


def test_every_configuration_is_within_its_limits() -> None:
    wrong = [fault for case in CASES if case.label in LINES for fault in faults(case, parse(LINES[case.label]))]
    assert not wrong, "\n".join(wrong)


def test_a_covering_subset_compiles_to_what_the_report_says() -> None:
    for case, found in compile_cases(covering(), jobs=min(2, os.cpu_count() or 1)):
        assert line(case, found) == LINES[case.label]
