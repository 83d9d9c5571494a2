"""The table of pinned configurations and its lookup."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

import simmp_fast.kernels  # noqa: F401  (fills the table)
from simmp_fast.kernels.configs import SHARED_LIMITS, TARGETS, lookup, register_table, rows, unserved, widths

ROWS = rows()


@pytest.mark.parametrize("capability", sorted(SHARED_LIMITS))
def test_lookup_never_asks_for_more_shared_memory_than_there_is(capability: tuple[int, int]) -> None:
    limit = SHARED_LIMITS[capability]
    for row in ROWS:
        for width in (1, row.width - 1, row.width):
            kind = "half" if row.dtype == "any" else row.dtype
            found = lookup(row.kernel, kind, max(width, 1), capability, limit)
            assert found.shared <= limit
            assert found.width >= width


def test_a_device_with_little_memory_gets_a_frugal_row_or_an_error() -> None:
    found = lookup("context_forward", "half", 256, (9, 0), 99 * 1024)
    assert found.shared <= 99 * 1024
    with pytest.raises(ValueError, match="context_forward: no configuration of width 256 in half fits 1000 bytes"):
        lookup("context_forward", "half", 256, (9, 0), 1000)


@pytest.mark.parametrize("limit", [0, 1000, 40 * 1024, 64 * 1024, 99 * 1024, 227 * 1024])
def test_the_table_says_beforehand_where_the_lookup_finds_nothing(limit: int) -> None:
    for kernel in {row.kernel for row in ROWS}:
        for kind in ("half", "float32", "tf32"):
            missing = unserved(kernel, kind, limit)
            for width in widths(kernel, kind):
                refused = any(least < width <= most for least, most in missing)
                try:
                    lookup(kernel, kind, width, (9, 0), limit)
                except ValueError:
                    assert refused
                else:
                    assert not refused
    assert limit < 99 * 1024 or not missing


def test_wider_than_the_table_is_an_error() -> None:
    with pytest.raises(ValueError, match="context_forward: got a width of 257 in half, expected at most 256"):
        lookup("context_forward", "half", 257, (9, 0), 227 * 1024)


def test_newer_devices_take_the_nearest_row() -> None:
    for capability in ((8, 7), (10, 3), (12, 1), (13, 0)):
        assert lookup("context_forward", "half", 96, capability, 99 * 1024).shared <= 99 * 1024
    exact = lookup("context_forward", "half", 128, (10, 0), 227 * 1024)
    assert lookup("context_forward", "half", 128, (10, 3), 227 * 1024) == exact


def test_every_target_is_served_exactly() -> None:
    for row in ROWS:
        kind = "half" if row.dtype == "any" else row.dtype
        for capability in TARGETS:
            found = lookup(row.kernel, kind, row.width, capability, SHARED_LIMITS[capability])
            assert capability in found.capabilities, (row, capability)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("x half 64 all A=1 4 2 16 0", "got 9 columns"),
        ("x int8 64 all A=1 4 2 16 0 measured", "got dtype 'int8'"),
        ("x half 64 all A=1 4 2 16 8 measured", "got stack 8 without a reason"),
        ("x half 64 9.0 A=1 4 2 16 0 measured", "got provenance 'measured' and Triton version ''"),
        ("x half 64 9.0@3.6 A=1 4 2 16 0 ahead-of-time", "and Triton version '3.6'"),
    ],
)
def test_a_bad_row_is_an_error(line: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        register_table(line)


def test_lengths_are_no_key() -> None:
    assert all(widths(row.kernel, row.dtype) for row in ROWS)
    names = {name for row in ROWS for name in row.tiles}
    assert not names & {"N", "B", "T", "TOKENS", "BATCH"}
