"""``pytest bench``: every case of the registry under pytest-benchmark; ``pytest bench -k fast`` takes the tiny ones.

A backend is measured only after its parity check passed; running out of memory skips.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from . import backends, cases, measure, memory, network, parity, pipeline, problems, steps
from .backends import Backend
from .cases import Case
from .formulas import FORMULAS
from .rows import PASSED

pytest.importorskip("pytest_benchmark")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.bfloat16, torch.float32) if DEVICE.type == "cuda" else (torch.float32,)


def _parameters() -> list[Any]:
    usual = cases.select(DEVICE.type, fast=True) + cases.select(DEVICE.type)
    found = []
    for case in usual:
        if case.operator in cases.AROUND:
            found.append(pytest.param(case, torch.float32, None, id=case.name))
            continue
        for dtype in DTYPES:
            for backend in backends.choose((), DEVICE, case.operator, case.compiled):
                name = f"{case.name}-{measure.dtype_name(dtype)}-{backend.name}"
                found.append(pytest.param(case, dtype, backend, id=name))
    return found


def _operator(case: Case, dtype: torch.dtype, backend: Backend) -> tuple[Callable[[], Any], parity.Verdict]:
    problem = problems.make(case.operator, case.sizes, dtype, DEVICE)
    output, leaves = problem.output(backend), problem.leaves

    def call() -> None:
        with torch.set_grad_enabled(bool(leaves)):
            result = output()
        if leaves:
            grad = None if result.dim() == 0 else torch.ones_like(result)
            torch.autograd.grad(result, leaves, grad, allow_unused=True)

    call()
    return call, parity.judge(problem, backend)


def _network(case: Case, dtype: torch.dtype, backend: Backend) -> tuple[Callable[[], Any], parity.Verdict]:
    whole = network.make(case.sizes, dtype, DEVICE)
    if case.operator == cases.STEP:
        taken = whole.steps()
        return lambda: taken.take(backend), steps.judge(taken, backend)
    call = network.forward_call(whole, backend)
    return call, network.judge_forward(whole, backend, call)


def _surroundings(case: Case, folder: Path) -> Callable[[], Any]:
    sizes = dict(case.sizes)
    if case.operator == "data_loader":
        cache = pipeline.write_cache(folder, sizes["slices"], sizes["side"])
        return lambda: pipeline.epoch(cache, sizes, 0)
    truth, prediction = pipeline.organs(sizes["slices"], sizes["side"], sizes["classes"])
    return lambda: pipeline.measure_classes(prediction, truth, sizes["classes"] + 1)


@pytest.mark.parametrize(("case", "dtype", "backend"), _parameters())
def test_case(benchmark: Any, tmp_path: Path, case: Case, dtype: torch.dtype, backend: Backend | None) -> None:
    benchmark.group = case.name
    benchmark.extra_info |= {"shape": dict(case.sizes), "uses": case.uses, "parity": PASSED}
    if backend is None:
        benchmark(_surroundings(case, tmp_path))
        return
    torch._dynamo.reset()
    gc.collect()
    try:
        call, verdict = (_network if case.operator in cases.NETWORK else _operator)(case, dtype, backend)
    except Exception as error:
        if memory.is_out_of_memory(error):
            pytest.skip("memory ran out")
        raise
    assert verdict.status == PASSED, verdict.message
    if case.operator in FORMULAS:
        cost = FORMULAS[case.operator].of("both", case.sizes, dtype.itemsize)
        benchmark.extra_info |= {"bytes": cost.bytes, "flops": cost.flops}

    def finished() -> None:
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark(finished)
