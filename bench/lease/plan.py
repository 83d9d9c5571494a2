"""What is done with a borrowed GPU, in which order, and for how long at most.

A call is one command on the GPU machine; its stages run in waves, those of one wave beside one another. A stage is a
program of its own, so that none takes another with it.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass

PYTHON = "{python}"
# Where a stage may write: "{work}" is kept while the machine is, "{here}" is the stage's own folder in it.
FORMS = (
    # backend, dtype, most seconds, profiled in the same process; what is asked most of a call that is cut comes first
    ("triton-fast", "bfloat16", 140, True),
    ("reference", "float32", 45, False),
    ("portable-compiled", "bfloat16", 100, False),
    ("triton-graph", "bfloat16", 45, True),
    ("triton", "bfloat16", 45, False),
    ("portable", "bfloat16", 30, False),
    ("reference", "bfloat16", 35, False),
)
# Judged once they are timed: of a form whose parity nobody has seen no speed-up is quoted.
JUDGED = ("triton-fast", "portable-compiled", "triton-graph")
MORE_FORMS = (
    ("triton", "float32", 40, False),
    ("triton-channels-last", "bfloat16", 40, False),
    ("portable", "float32", 40, False),
    ("triton-compiled", "bfloat16", 120, False),
)
# The tests that neither wait for Inductor nor want the GPU for themselves.
SHORT = "gpu and not compiles and not alone"
# The kernels of the step by what they are predicted to take, largest first: tuned in this order.
LARGEST = (
    "context_backward_key_value", "context_backward_query", "context_forward", "powerset_loss_sums",
    "powerset_loss_pixels", "update_write", "memory_context_backward_query", "memory_context_forward",
    "memory_backward_query", "memory_forward", "split_attention_key_value", "split_attention_query",
)  # fmt: skip
DEMO = ("{demo}", "SIMMP_FAST_DEMO_CACHE, a prepared cache of the demo")


@dataclass(frozen=True)
class Stage:
    """One program.

    Attributes:
        name: in the log, the table and the record of what is done.
        command: its arguments, with places in braces that `execute` fills in.
        seconds: it is stopped after them.
        rows: whether `results.jsonl` in its folder holds rows to keep; what runs beside others is no measurement.
        wants: a file without which it is passed over, in words where it comes from.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    rows: bool = False
    wants: tuple[str, str] | None = None


@dataclass(frozen=True)
class Call:
    """One command on the GPU machine.

    Attributes:
        name: sub-command.
        seconds: the whole call ends before them.
        about: one line.
        waves: stages that start together; the next wave begins when all of them have ended.
    """

    name: str
    seconds: float
    about: str
    waves: tuple[tuple[Stage, ...], ...]


def tests_at_once() -> int:
    """Processes that share the tests: they compile, which wants cores, and two are left for what runs beside them."""
    if importlib.util.find_spec("xdist") is None:
        return 1
    return max(1, min(12, len(os.sched_getaffinity(0)) - 2))


def _tests(name: str, seconds: float, selection: str, jobs: int, wants: tuple[str, str] | None = None) -> Stage:
    shared = ("-n", str(jobs), "--dist", "worksteal") if jobs > 1 else ()
    command = (PYTHON, "-m", "pytest", "tests/gpu", "-m", selection, "--require-gpu", "-q", "-p", "no:cacheprovider")
    return Stage(name, (*command, *shared, "--durations=10"), seconds, wants=wants)


def _form(backend: str, dtype: str, seconds: float, profiled: bool) -> Stage:
    command = (PYTHON, "-m", "bench.form", "--backend", backend, "--dtype", dtype, "--device", "cuda")
    more = (("--profile",) if profiled else ()) + (() if backend in JUDGED else ("--no-parity",))
    more += ("--steps", "8") if backend == "reference" else ()  # half a second each
    return Stage(f"step-{backend}-{dtype}", (*command, *more, "--out", "{here}"), seconds, rows=True)


def _compiled(backend: str) -> Stage:
    """Fills the compiler's cache; its row, taken beside other work, is not kept."""
    command = (PYTHON, "-m", "bench.form", "--backend", backend, "--dtype", "bfloat16", "--device", "cuda")
    return Stage(f"compile-{backend}", (*command, "--steps", "1", "--no-parity", "--out", "{here}"), 230)


def _bench(name: str, seconds: float, *arguments: str) -> Stage:
    command = (PYTHON, "-m", "simmp_fast.cli", "bench", *arguments, "--device", "cuda", "--out", "{here}")
    return Stage(name, command, seconds, rows=True)


def _sanitized(tool: str) -> Stage:
    return Stage(f"sanitize-{tool}", ("sh", "tests/gpu/sanitize.sh", "-o", "{here}", tool), 150)


def _tuned(name: str, seconds: float, kernels: tuple[str, ...]) -> Stage:
    minutes = f"{max(seconds - 10, 20) / 60:.2f}"
    command = (PYTHON, "-m", "simmp_fast.kernels.tune", *kernels, "--dtype", "half", "--minutes", minutes)
    wants = ("{cache}/candidates.jsonl", "a warm cache (python -m bench.warm)")
    return Stage(name, (*command, "--candidates", wants[0]), seconds, wants=wants)


CHECK = Call(
    "check", 240, "tests of every kernel, sanitizers; what is compiled for the step, beside them",
    ((
        _tests("tests", 225, SHORT, tests_at_once()),
        _sanitized("memcheck"), _sanitized("racecheck"),
        _tests("tests-compiled", 230, "gpu and compiles", 1),
        _compiled("triton-fast"), _compiled("portable-compiled"),
    ),),
)  # fmt: skip
MEASURE = Call(
    "measure", 300, "the training step at the published batch, a process a form, and its profiles",
    tuple((_form(*form),) for form in FORMS),
)  # fmt: skip
REST = Call(
    "rest", 280, "large tensors, attention against PyTorch's, tuning; then all that is left",
    (
        (_tests("tests-alone", 60, "gpu and alone and not convergence", 1),),
        (_bench("context", 80, "--group", "context", "--dtype", "bfloat16", "--seconds", "1"),),
        (_tuned("tune-largest", 100, LARGEST),),
        (_bench("step-parity", 120, "training_step", "--backend", "reference", "triton", "--dtype", "bfloat16"),),
        *(
            (_bench(name, 90, "--group", name, "--dtype", "bfloat16", "--seconds", "1"),)
            for name in ("operators", "blocks", "dsgim", "loss", "network")
        ),
        *((_form(*form),) for form in MORE_FORMS),
        (_tests("tests-convergence", 300, "gpu and convergence", 1, DEMO),),
        *(
            (_bench(f"sweep-{size}", 90, "--group", f"sweep {size}", "--dtype", "bfloat16", "--seconds", "1"),)
            for size in "NKMDB"
        ),
        (_tuned("tune-all", 400, ()),),
    ),
)  # fmt: skip
CALLS = {call.name: call for call in (CHECK, MEASURE, REST)}
