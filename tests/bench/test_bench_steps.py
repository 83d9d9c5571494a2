"""The training step on backends that compile it, lay it out otherwise, or replay it; the budgets that judge it."""

from __future__ import annotations

import pytest
import torch
from tape import TapeRecorder

from bench import backends, budgets, network, steps
from bench.backends import BACKENDS, Backend
from bench.cases import _TINY, PARTS, STEP, WITHOUT_BACKBONE
from bench.measure import Contender, Settings
from bench.rows import OUT_OF_MEMORY, PASSED, Row
from bench.steps import Steps
from simmp_fast.config import ConfigError

CPU = torch.device("cpu")
OTHERS = [
    Backend("portable-graph", "portable", replayed=True),
    Backend("portable-channels-last", "portable", channels_last=True),
]


@pytest.fixture
def tiny() -> Steps:
    made = network.make(_TINY[STEP], torch.float32, CPU).steps()
    made.recorder = TapeRecorder
    return made


def test_replayed_and_laid_out_steps_are_judged_and_timed(tiny: Steps) -> None:
    contenders = [Contender(backend) for backend in (BACKENDS["reference"], BACKENDS["portable"], *OTHERS)]
    found = steps.measure(tiny, contenders, Settings(CPU, seconds=0.01))
    names = ("reference", "portable", "portable-graph", "portable-channels-last")
    verdicts = {c.backend.name: (c.status, c.verdict.status, c.verdict.message) for c in contenders}
    assert verdicts == {name: ("", PASSED, verdicts[name][2]) for name in names}
    assert found.keys() == {c.backend.name for c in contenders}
    for values in found.values():
        assert len(values[""]) == len(values[PARTS[0]]) >= 3
    replays = tiny.of(OTHERS[0]).replays
    assert replays is not None
    assert replays.replaying
    assert tiny.of(OTHERS[1]).model is not tiny.model
    assert all(contender.peaks["both"] for contender in contenders)


def test_a_replay_of_something_else_is_noticed(tiny: Steps) -> None:
    class Stale(TapeRecorder):
        """A capture that writes what it wrote before."""

        def capture(self, call):
            replay = super().capture(call)
            return lambda: replay() * 1.01

    tiny.recorder = Stale
    contender = Contender(OTHERS[0])
    steps.measure(tiny, [contender], Settings(CPU, seconds=0.01))
    assert contender.verdict.status == "failed"
    assert "allowed" in contender.verdict.message


def test_a_failing_step_is_a_row_and_leaves_the_others_alone(tiny: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(TapeRecorder):
        def capture(self, call):
            raise torch.OutOfMemoryError("CUDA out of memory")

    tiny.recorder = Full
    contenders = [Contender(OTHERS[0]), Contender(BACKENDS["portable"])]
    found = steps.measure(tiny, contenders, Settings(CPU, seconds=0.01))
    assert contenders[0].status == OUT_OF_MEMORY
    assert list(found) == ["portable"]


def test_a_step_that_fails_in_its_turn_leaves_the_others(tiny: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []

    def timed(made: Steps, backend: Backend, clock: object) -> dict[str, float]:
        taken.append(backend.name)
        if backend.name == "portable" and taken.count("portable") == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return dict.fromkeys(("", WITHOUT_BACKBONE, *PARTS), 1.0)

    monkeypatch.setattr(steps, "_prepare", lambda *arguments: None)
    monkeypatch.setattr(steps, "_timed", timed)
    contenders = [Contender(BACKENDS[name]) for name in ("reference", "portable")]
    found = steps.measure(tiny, contenders, Settings(CPU, seconds=0.0))
    assert [c.status for c in contenders] == ["", OUT_OF_MEMORY]
    assert list(found) == ["reference"]
    assert found["reference"][""] == [1.0, 1.0, 1.0]
    assert taken.count("portable") == 2


def test_only_the_step_has_layouts_and_replays() -> None:
    names = ["triton-fast", "triton-graph", "triton-channels-last"]
    assert [name for name in names if BACKENDS[name].takes(STEP)] == names
    assert not [name for name in names if BACKENDS[name].takes("dmwla_block")]
    with pytest.raises(ConfigError, match="'triton-fast' cannot run here"):
        backends.choose(["triton-fast"], CPU, STEP, compiled=True)


def gpu_row(operator: str, backend: str, dtype: str = "bfloat16", label: str = "", **values: object) -> Row:
    environment = {"device": "cuda", "bfloat16_tflop_s": 700.0, "l2_mib": 50.0}
    row = Row(operator, "operators", label, 1, backend, "both", {}, dtype, parity=PASSED, environment=environment)
    for name, value in values.items():
        setattr(row, name, value)
    return row


def test_budgets_of_a_gpu() -> None:
    rows = [
        gpu_row(STEP, "reference", "float32", median_ms=1000.0, peak_bytes=100),
        gpu_row(STEP, "portable-compiled", median_ms=200.0),
        gpu_row(STEP, "triton", median_ms=120.0, peak_bytes=30, syncs=0),
        gpu_row(STEP, "triton-fast", median_ms=80.0, peak_bytes=20, syncs=1),
        gpu_row("dmwla_block", "triton", label="encoder stage 1", median_ms=2.0, flops=7 * 10**11),
        gpu_row("context_attention", "sdpa", label="encoder stage 1, reassociated", median_ms=1.5),
        gpu_row("memory_attention", "triton", median_ms=0.9, roofline_ms=0.4),
        gpu_row("powerset_loss", "triton", median_ms=1.0, bytes=2**30, bound="memory", roofline_share=0.85),
        gpu_row("window_similarity", "triton", median_ms=1.0, bytes=2**20, bound="memory", roofline_share=0.1),
    ]
    found = {budget.what: (budget.measured, budget.met) for budget in budgets.check(rows)}
    block = "DMW-LA block at 56x56"
    assert found == {
        "training step, triton-fast bfloat16 against reference float32": ("12.50x", True),
        "its peak memory over that of the reference": ("0.20", True),
        "training step, triton-fast bfloat16 against portable-compiled bfloat16": ("2.50x", False),
        "host waits in a training step": ("1", False),
        f"{block}, share of the measured bfloat16 matrix rate": ("50 %", True),
        f"{block}, milliseconds, against SDPA alone plus the roofline of the memory part": ("2.000", False),
        "powerset_loss, both: share of the measured copy bandwidth": ("85 %", True),
    }


def test_a_step_that_failed_parity_keeps_no_budget() -> None:
    wrong = gpu_row(STEP, "triton", median_ms=1.0)
    wrong.parity = "failed"
    assert budgets.check([gpu_row(STEP, "reference", "float32", median_ms=1000.0), wrong]) == []
