"""What is done with one candidate on the device: compile and judge it, compare its results, time it."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .aot import Case, Resources, faults, resources_of
from .configs import Config, forced
from .launch import watched
from .search import Subject, Target
from .workloads import Run, workload

# The dtype that stands for a class, by PyTorch and by the names of `aot`.
STANDS_FOR = {
    "half": (torch.bfloat16, "bfloat16"),
    "float32": (torch.float32, "float32"),
    "tf32": (torch.float32, "tf32"),
    "any": (torch.bfloat16, "bfloat16"),
}
# Of a timing: calls in one graph, and the replays whose median counts; few where they take long.
CALLS, REPLAYS, MILLISECONDS = 5, 20, 60.0


def agree(found: Sequence[Tensor], known: Sequence[Tensor]) -> bool:
    """Whether two results differ by rounding alone."""
    for mine, yours in zip(found, known, strict=True):
        if not mine.is_floating_point():
            if not torch.equal(mine, yours):
                return False
            continue
        rounding = 8 * torch.finfo(mine.dtype).eps
        difference, size = (mine.double() - yours.double()).norm(), yours.double().norm()
        if not bool(difference <= rounding * size + 1e-12):
            return False
    return True


def case_of(config: Config, dtype: str, target: Target) -> Case:
    """A candidate as `aot` knows it: any shared memory that the device has is allowed."""
    return Case(config.kernel, STANDS_FOR[dtype][1], replace(config, shared=target.limit), target.capability)


def judged(config: Config, dtype: str, compiled: Any, target: Target) -> Config | str:
    """The configuration with what its compiled kernel needs; in words why it cannot be used, if it cannot."""
    return _judged(config, case_of(config, dtype, target), resources_of(compiled, target.capability))


def _judged(config: Config, case: Case, found: Resources) -> Config | str:
    wrong = faults(case, found)
    return wrong[0] if wrong else replace(config, shared=max(found.shared, 1024), stack=found.stack)


@functools.lru_cache(maxsize=1)
def _workload(subject: Subject, index: int) -> tuple[Run, Any]:
    """The workload, and the stream it was made on: a backward pass runs on the stream of its forward pass."""
    torch.backends.cuda.matmul.fp32_precision = "tf32" if subject.dtype == "tf32" else "ieee"
    device = torch.device("cuda", index)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        return workload(subject.kernel, subject.width, STANDS_FOR[subject.dtype][0], device), stream


def compiled(subject: Subject, config: Config, target: Target) -> Config | str:
    """`judged`, by a launch of the workload, which leaves the machine code in Triton's cache."""
    return next(compiled_each([config], subject, target))[0]


def compiled_each(
    configs: Sequence[Config], subject: Subject, target: Target
) -> Iterator[tuple[Config | str, Resources]]:
    """`compiled` for one candidate after the other, each with all that its machine code needs."""
    with torch.cuda.device(target.index):
        run, stream = _workload(subject, target.index)
        for config in configs:
            with torch.cuda.stream(stream), forced(config), watched() as seen:
                run()
                torch.cuda.synchronize()
            found = resources_of(seen[config.kernel], target.capability)
            yield _judged(config, case_of(config, subject.dtype, target), found), found


def timed_each(configs: Sequence[Config], subject: Subject, start: Config, target: Target) -> Iterator[float | str]:
    """Milliseconds of one configuration after the other; words for one whose results are not those of `start`."""
    with torch.cuda.device(target.index):
        run, stream = _workload(subject, target.index)
        with torch.cuda.stream(stream):
            with forced(start):
                known = [x.clone() for x in run()]
            for config in configs:
                with forced(config):
                    same = config == start or agree(run(), known)
                    yield milliseconds(run, stream) if same else "other results"


def milliseconds(run: Run, stream: Any) -> float:
    """The median time of a call that already ran, by replays of a graph: the host's part of a launch does not count."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(CALLS):
            run()
    graph.replay()
    begin, over = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times: list[float] = []
    while len(times) < REPLAYS and (len(times) < 3 or sum(times) * CALLS < MILLISECONDS):
        begin.record(stream)
        graph.replay()
        over.record(stream)
        over.synchronize()
        times.append(begin.elapsed_time(over) / CALLS)
    return sorted(times)[len(times) // 2]
