"""Who may show a speed-up: the yardstick of the tests (tests/parity.py), on the case's own inputs, in the same run.

The reference passes: it is what the others are compared with. Where images have nothing to do with one another they are
checked a few at a time, since the yardstick materialises what the definition names, in float64.

A module is judged by the operator calls it makes, each on the very tensors it is given: the split of DS-GIM turns
rounding into other sets, so a comparison of the module's output would compare those. Its compiled form is judged by how
far its output is from that of the eager one; for the whole network, beside how far the eager one is from itself where
its parameters move by one rounding.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from simmp_fast import ops, reference

from .backends import BACKENDS, BASELINE, Backend
from .environment import ROOT
from .memory import is_out_of_memory
from .problems import Problem
from .rows import NOT_CHECKED, PARITY_FAILED, PASSED

# Elements of the largest tensor that the yardstick materialises for the images it takes at once.
AT_ONCE = 2**27
# Agreement of a compiled module with its eager form, relative Frobenius norm, by bytes of an element.
COMPILED_AGREEMENT = {8: 1e-9, 4: 1e-4, 2: 3e-2}
# Runs with moved parameters whose farthest output is the spread of a network.
NUDGES = 4

# Operators whose images have nothing to do with one another, and their arguments that have one row an image.
_BY_IMAGE = ("context_attention", "memory_attention", "memory_context_attention", "split_attention", "split_threshold")
_IMAGES = ("query", "key", "value", "cluster", "row_mean", "threshold")

Call = tuple[str, dict[str, Any]]


@dataclass(frozen=True)
class Verdict:
    """What became of a parity check.

    Attributes:
        status: "passed", "failed" or "not checked".
        message: what failed, or why nothing was checked.
    """

    status: str = NOT_CHECKED
    message: str = ""


def _yardstick() -> ModuleType:
    """tests/parity.py; pytest finds it by the same name."""
    folder = str(ROOT / "tests")
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module("parity")


def judge(problem: Problem, backend: Backend) -> Verdict:
    """The verdict on a backend that runs on the inputs of a case."""
    if backend.name == BASELINE:
        return Verdict(PASSED)
    if problem.module is None:
        return check(problem.operator, problem.candidate(backend), problem.arguments)
    eager = BACKENDS[backend.door]
    if backend.compiled:
        return agreement(problem.output(backend)(), problem.output(eager)())
    with torch.no_grad(), recorded() as calls:
        problem.run(eager)()
    return judge_calls(calls, door(eager.door, problem.device, problem.autocast))


def judge_calls(calls: Sequence[Call], candidate: Callable[..., Any]) -> Verdict:
    """The verdict on recorded operator calls, made again; the first that is not passed decides.

    Args:
        calls: names and arguments, from `recorded`.
        candidate: takes the operator's name, then its arguments by name.
    """
    if not calls:
        return Verdict(message="no operator was called")
    for name, arguments in calls:
        verdict = check(name, lambda name=name, **inputs: candidate(name, **inputs), arguments)
        if verdict.status != PASSED:
            return verdict
    return Verdict(PASSED)


def door(backend: str, device: torch.device, autocast: torch.dtype | None = None) -> Callable[..., Any]:
    """Calls any operator by its name on one backend, under autocast where a dtype is given."""

    def candidate(operator: str, **arguments: Any) -> Any:
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            return getattr(ops, operator)(**arguments, backend=backend)

    return candidate


def check(operator: str, candidate: Callable[..., Any], arguments: dict[str, Any]) -> Verdict:
    """Hold an implementation to the yardstick on these arguments."""
    tests = _yardstick()
    inputs = {name: _detached(value) for name, value in arguments.items()}
    if operator == "assign_clusters":
        inputs.setdefault("metric", "cosine")
    try:
        for images in _shares(operator, inputs):
            part = {name: _slice(name, value, images) for name, value in inputs.items()}
            tests.check_inputs(operator, candidate, part, operator)
    except AssertionError as difference:
        return Verdict(PARITY_FAILED, str(difference).splitlines()[0])
    except Exception as error:
        reason = "memory ran out" if is_out_of_memory(error) else f"{type(error).__name__}: {error}"
        return Verdict(NOT_CHECKED, f"the yardstick could not run: {reason}"[:300])
    return Verdict(PASSED)


def _detached(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_detached(item) for item in value]
    return value.detach() if isinstance(value, Tensor) else value


def _shares(operator: str, inputs: dict[str, Any]) -> list[slice]:
    """The images that the yardstick takes at once: equal shares, so that a compiled form meets one shape."""
    if operator not in _BY_IMAGE:
        return [slice(None)]
    batch, length, width = inputs["query"].shape
    memory = inputs.get("memory")
    largest = length * max(length, 0 if memory is None else memory.shape[1] * width)
    most = max(1, AT_ONCE // max(largest, 1))
    step = next((n for n in range(min(most, batch), 0, -1) if batch % n == 0), 1)
    return [slice(start, start + step) for start in range(0, batch, step)]


def _slice(name: str, value: Any, images: slice) -> Any:
    return value[images] if name in _IMAGES and isinstance(value, Tensor) else value


@contextlib.contextmanager
def recorded() -> Iterator[list[Call]]:
    """The operator calls made inside the block, in order: names and arguments, detached."""
    calls: list[Call] = []
    originals = {name: getattr(ops, name) for name in reference.__all__}

    def listening(name: str) -> Callable[..., Any]:
        original, signature = originals[name], inspect.signature(getattr(reference, name))

        def call(*positional: Any, backend: str = "auto", **named: Any) -> Any:
            arguments = signature.bind(*positional, **named).arguments
            calls.append((name, {key: _detached(value) for key, value in arguments.items()}))
            return original(*positional, backend=backend, **named)

        return call

    try:
        for name in originals:
            setattr(ops, name, listening(name))
        yield calls
    finally:
        for name, original in originals.items():
            setattr(ops, name, original)


def agreement(result: Tensor, eager: Tensor, spread: float = 0.0) -> Verdict:
    """Whether the output of a compiled or replayed form is that of the eager one, within rounding.

    Args:
        result, eager: the two outputs.
        spread: of `nudged_spread`, where rounding is amplified; twice as much is allowed.
    """
    distance = _distance(result, eager)
    norm = float(eager.detach().double().norm())
    allowed = max(COMPILED_AGREEMENT[eager.element_size()] * norm, 2 * spread)
    if distance <= allowed:
        return Verdict(PASSED, "compared with the eager form")
    return Verdict(PARITY_FAILED, f"{distance:.3g} from the eager form, allowed {allowed:.3g}")


def _distance(one: Tensor, other: Tensor) -> float:
    return float((one.detach().double() - other.detach().double()).norm())


def nudged_spread(run: Callable[[], Tensor], model: torch.nn.Module, dtype: torch.dtype) -> float:
    """How far the output of a network moves where all its parameters move by one rounding.

    The split of DS-GIM turns a difference in rounding into another set of tokens; so two right forms of the whole
    network differ by this much.

    Args:
        run: gives the same output again while the parameters rest.
        model: whose parameters are moved, and put back.
        dtype: of the matrix products.
    """
    generator = torch.Generator().manual_seed(0)
    kept = [parameter.detach().clone() for parameter in model.parameters()]

    def nudged(value: Tensor) -> Tensor:
        signs = torch.randint(0, 2, value.shape, generator=generator).mul_(2).sub_(1).to(value)
        return value * (1 + torch.finfo(dtype).eps * signs)

    known, farthest = run().detach().clone(), 0.0
    try:
        for _ in range(NUDGES):
            _set(model, [nudged(value) for value in kept])
            farthest = max(farthest, _distance(run(), known))
    finally:
        _set(model, kept)
    return farthest


@torch.no_grad()
def _set(model: torch.nn.Module, values: Sequence[Tensor]) -> None:
    for parameter, value in zip(model.parameters(), values, strict=True):
        parameter.copy_(value)
