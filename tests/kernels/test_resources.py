"""The committed report of compiled resources: complete, clean, and true for a covering subset compiled here."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from simmp_fast.kernels.aot import Case, faults, half_products, plan, signature  # noqa: E402
from simmp_fast.kernels.compile import (  # noqa: E402
    compile_cases,
    is_current,
    line,
    load_kernels,
    parse,
    read_report,
    version_line,
)
from simmp_fast.kernels.configs import SHARED_LIMITS, TARGETS  # noqa: E402

load_kernels()
CASES = list(plan())
VERSION, LINES = read_report()
REGENERATE = "python -m simmp_fast.kernels.compile"

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="interpreted kernels are not compiled")


def covering() -> list[Case]:
    """For each kernel one case, targets and dtypes in turn, so that every target and every dtype is met.

    Hopper comes more often for kernels with products: its machine code is searched for hazards.
    """
    kernels = list(dict.fromkeys(case.kernel for case in CASES))
    chosen = []
    for i, kernel in enumerate(kernels):
        own = [case for case in CASES if case.kernel == kernel and case.dtype in ("bfloat16", "float16")]
        own = own or [case for case in CASES if case.kernel == kernel]
        smallest = min(case.config.width for case in own)
        own = [case for case in own if case.config.width == smallest]
        if i % 2 and i % 3 and signature(own[0]).products:
            own = [case for case in own if case.capability == (9, 0)]
        chosen.append(own[(7 * i) % len(own)])
    assert {case.capability for case in chosen} == set(TARGETS)
    return chosen


def test_the_report_is_current() -> None:
    stale = [case.label for case in CASES if not is_current(case, LINES.get(case.label))]
    assert not stale, f"{len(stale)} of {len(CASES)} cases are stale, first {stale[:5]}; run: {REGENERATE}"
    gone = set(LINES) - {case.label for case in CASES}
    assert not gone, f"the report has cases that the table has not: {sorted(gone)[:5]}; run: {REGENERATE}"


def test_every_configuration_is_within_its_limits() -> None:
    wrong = [fault for case in CASES if case.label in LINES for fault in faults(case, parse(LINES[case.label]))]
    assert not wrong, "\n".join(wrong)


def test_a_covering_subset_compiles_within_its_limits_and_to_what_the_report_says() -> None:
    """With any compiler; what rows and report say of stack and shared memory is true for the report's own.

    With another one every case must compile, fit its device and multiply by matrix instructions.
    """
    for case, found in compile_cases(covering(), jobs=min(2, os.cpu_count() or 1)):
        if version_line() == VERSION:
            assert not faults(case, found)
            assert line(case, found) == LINES[case.label]
        else:
            free = replace(case.config, shared=SHARED_LIMITS[case.capability], stack=found.stack)
            assert not faults(replace(case, config=free), found)


@triton.jit
def _product(a, b, c, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, ELEMENT: tl.constexpr):
    rows, columns, inner = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    left = tl.load(a + rows[:, None] * K + inner[None, :]).to(ELEMENT)
    right = tl.load(b + inner[:, None] * N + columns[None, :]).to(ELEMENT)
    tl.store(c + rows[:, None] * N + columns[None, :], tl.dot(left, right))


@pytest.mark.parametrize(
    ("capability", "rows", "element", "expected"),
    [
        (80, 64, tl.bfloat16, ["mma.sync"]),
        (90, 64, tl.bfloat16, ["wgmma"]),
        (90, 16, tl.bfloat16, ["mma.sync"]),  # too few rows for a warp group
        (80, 64, tl.float16, ["mma.sync"]),
        (80, 64, tl.float32, []),  # no product of half precision
    ],
)
def test_half_products_are_found_and_told_apart(
    capability: int, rows: int, element: tl.dtype, expected: list[str]
) -> None:
    constants = {"M": rows, "N": 64, "K": 32, "ELEMENT": element}
    types = {"a": "*fp32", "b": "*fp32", "c": "*fp32", **dict.fromkeys(constants, "constexpr")}
    source = triton.compiler.ASTSource(_product, types, constants)
    target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": 4, "enable_fp_fusion": True})
    assert half_products(compiled.asm["ttgir"]) == expected


def test_a_product_number_by_number_is_named() -> None:
    line = "%0 = tt.dot %a, %b, %c : tensor<8x8xbf16, #x> * tensor<8x8xbf16, #y> -> tensor<8x8xf32, #blocked>"
    assert half_products("#mma = #ttg.nvidia_mma<{versionMajor = 2}>\n" + line) == ["fma"]
