"""Failures are rows, parity guards speed-ups, memory is counted, noise is called noise."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import compare, measure, memory, parity, problems, run, timing
from bench.backends import BACKENDS
from bench.cases import Case
from bench.measure import Settings
from bench.parts import PartClock, wrap
from bench.rows import FAILED, OUT_OF_MEMORY, PARITY_FAILED, PASSED, Row, read_jsonl, write_jsonl
from simmp_fast import ops, portable
from simmp_fast.cli import bench as command
from simmp_fast.cli import main
from simmp_fast.config import ConfigError

CPU = torch.device("cpu")
SIZES = {"B": 1, "N": 20, "D": 8}
CASE = Case("context_attention", SIZES, "asked")


def settings() -> Settings:
    return Settings(CPU, backends=("portable",), seconds=0.01)


def rows_of_portable(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row.backend == "portable"]


def test_wrong_numbers_get_no_speedup(monkeypatch: pytest.MonkeyPatch) -> None:
    right = portable.context_attention
    monkeypatch.setattr(portable, "context_attention", lambda q, k, v: right(q, k, v) * 1.001)
    rows = measure.measure_case(CASE, torch.float32, settings())
    assert {row.parity for row in rows_of_portable(rows)} == {PARITY_FAILED}
    assert all(row.speedup is None and row.median_ms is not None for row in rows_of_portable(rows))
    assert "allowed" in rows_of_portable(rows)[0].message


def test_a_wrong_operator_inside_a_module_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = portable.memory_attention

    def wrong(*arguments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        output, cluster = right(*arguments)
        return output * 1.001, cluster

    monkeypatch.setattr(portable, "memory_attention", wrong)
    sizes = {"B": 1, "N": 16, "C": 6, "D": 8, "K": 2, "M": 5, "k": 2}
    rows = measure.measure_case(Case("dmwla_block", sizes, "asked"), torch.float32, settings())
    assert {row.parity for row in rows_of_portable(rows)} == {PARITY_FAILED}
    assert ops.memory_attention.__module__ == "simmp_fast.ops", "the recorder left nothing behind"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), OUT_OF_MEMORY),
        (torch.OutOfMemoryError("CUDA out of memory"), OUT_OF_MEMORY),
        (ValueError("no such thing"), FAILED),
    ],
)
def test_failures_are_rows(monkeypatch: pytest.MonkeyPatch, error: Exception, status: str) -> None:
    def fails(*arguments: torch.Tensor) -> torch.Tensor:
        raise error

    monkeypatch.setattr(portable, "context_attention", fails)
    rows = measure.measure_case(CASE, torch.float32, settings())
    (row,) = rows_of_portable(rows)
    assert row.status == status
    assert row.median_ms is None
    assert row.speedup is None
    assert any(r.backend == "reference" and r.median_ms is not None for r in rows), "the others go on"


def test_a_row_is_kept_as_soon_as_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    first, kept = row(10, 1), []

    def measured(case: Case, settings: Settings) -> Iterator[Row]:
        yield first
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "rows_of", measured)
    with pytest.raises(KeyboardInterrupt):
        run.run([CASE, CASE], Settings(CPU, fast=True), keep=kept.append)
    assert kept == [first]


def test_a_dtype_that_fails_takes_no_other_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    right = measure.measure_case

    def measured(case: Case, dtype: torch.dtype, settings: Settings) -> list[Row]:
        if dtype == torch.bfloat16:
            raise RuntimeError("no such number")
        return right(case, dtype, settings)

    monkeypatch.setattr(measure, "measure_case", measured)
    both = replace(settings(), dtypes=(torch.bfloat16, torch.float32))
    found = {(r.dtype, r.status) for r in run.run([CASE], replace(both, fast=True))}
    assert found == {("bfloat16", FAILED), ("float32", "ok")}


def test_the_run_ends_with_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(measure, "broken", lambda device: "CUDA error: an illegal memory access")
    rows = run.run([CASE, CASE], replace(settings(), fast=True), said.append)
    assert {r.backend for r in rows} == {"reference", "portable"}
    assert said == [CASE.name, "the device can no longer be used, the run ends here: " + measure.broken(CPU)]


def test_a_contender_that_fails_in_its_turn_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """It works while it is warmed up and judged, and breaks in the second round."""
    calls = 0
    right = timing._turn

    def turn(runner: timing.Runner, *rest: Any) -> Any:
        nonlocal calls
        calls += runner.name == "portable"
        if runner.name == "portable" and calls == 3:
            raise RuntimeError("launch failure")
        return right(runner, *rest)

    monkeypatch.setattr(timing, "_turn", turn)
    rows = measure.measure_case(CASE, torch.float32, settings())
    (failed,) = rows_of_portable(rows)
    assert (failed.status, failed.message, failed.speedup) == (FAILED, "RuntimeError: launch failure", None)
    others = [r for r in rows if r.backend == "reference"]
    assert {(r.direction, r.status, len(r.samples_ms) >= 3) for r in others} == {
        (direction, "ok", True) for direction in measure.DIRECTIONS
    }
    assert calls == 3, "it took no turn after that"


def test_without_the_baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = measure.measure_case(CASE, torch.float32, replace(settings(), baseline=False))
    assert {r.backend for r in rows} == {"portable"}
    assert all(r.parity == PASSED and r.speedup is None for r in rows)
    named = replace(settings(), baseline=False, backends=("reference", "portable"))
    assert {b.name for b in named.backends_of(CASE)} == {"reference", "portable"}
    assert "reference" not in {b.name for b in Settings(CPU, baseline=False).backends_of(CASE)}


def test_what_is_found_beside_the_time_may_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(call: object, device: torch.device) -> int:
        raise RuntimeError("no profiler")

    monkeypatch.setattr(memory, "peak_bytes", fails)
    (first, *_) = rows_of_portable(measure.measure_case(CASE, torch.float32, settings()))
    assert first.median_ms is not None
    assert first.peak_bytes is None
    assert "memory and launches: RuntimeError: no profiler" in first.message


class _Device(timing.Clock):
    """A GPU's clock without a GPU: notes what is asked of the device."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(CPU)
        self.cuda = True
        self.asked: list[float] = []

    def mark(self) -> float:
        return time.perf_counter()

    def cold(self, ahead: float = 0.0) -> None:
        self.asked.append(ahead)

    def wait(self) -> None:
        """Nothing runs by itself here."""


@pytest.mark.parametrize("hide", [True, False])
def test_the_device_sleeps_while_the_host_starts_a_call(hide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    clocks: list[_Device] = []

    def made(device: torch.device) -> _Device:
        clocks.append(_Device(device))
        return clocks[-1]

    leaf = torch.ones(2, requires_grad=True)

    def slow(seconds: float) -> torch.Tensor:
        time.sleep(seconds)
        return leaf.sum()

    monkeypatch.setattr(timing, "Clock", made)
    runners = [timing.Runner(name, lambda s=s: slow(s), (leaf,)) for name, s in (("a", 0.002), ("b", 0.05))]
    assert timing.measure(runners, CPU, 1e-9, hide_host=hide) == {}
    (clock,) = clocks
    forward = clock.asked[::2]
    if not hide:
        assert set(clock.asked) == {0.0}
        return
    assert 2 * 0.002 <= forward[0] < timing.MOST_AHEAD == forward[1]
    assert 0 < clock.asked[1] <= timing.MOST_AHEAD, "the backward pass has a sleep of its own"


def test_a_case_that_cannot_be_made_is_a_row() -> None:
    bad = Case("dmwla_block", {"B": 1, "N": 15, "C": 6, "D": 8, "K": 2, "M": 5, "k": 2}, "asked")
    rows = run.run([bad, CASE], Settings(CPU, backends=("portable",), seconds=0.01, fast=True))
    assert {r.status for r in rows if r.operator == "dmwla_block"} == {FAILED}
    assert "square number" in rows[0].message
    assert {r.status for r in rows if r.operator == "context_attention"} == {"ok"}


@pytest.mark.skipif(memory.available_bytes() is None, reason="this system does not say what memory is free")
def test_memory_beyond_the_machine_is_an_exception() -> None:
    with memory.bounded(CPU), pytest.raises(RuntimeError) as failure:
        torch.ones(2**46, dtype=torch.int8)
    assert memory.is_out_of_memory(failure.value)


def test_peak_of_known_allocations() -> None:
    a = torch.ones(1000)

    def call() -> torch.Tensor:
        b = a + 1  # 4,000 bytes
        c = b + 1  # and as much again
        del b
        return c + 1

    call()
    # Two at once; the numbers that are added become tensors too.
    assert 8000 <= memory.peak_bytes(call, CPU) <= 8100


@pytest.mark.parametrize("operator", ["context_attention", "powerset_loss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_forms(operator: str, dtype: torch.dtype) -> None:
    """The compiled call, without a compiler: what is compiled is what is measured and judged."""
    from bench import cases

    problem = problems.make(operator, cases._TINY[operator], dtype, CPU)
    seen = []

    def fake_compile(function: object, **options: object) -> object:
        seen.append(function)
        return function

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", fake_compile)
        assert parity.judge(problem, BACKENDS["reference-compiled"]).status == PASSED
        problem.output(BACKENDS["reference-compiled"])()
    assert len(seen) == 1


def test_turns_and_ratios() -> None:
    order: list[str] = []

    def call(name: str) -> torch.Tensor:
        order.append(name)
        return torch.zeros(1)

    runners = [timing.Runner(name, lambda name=name: call(name)) for name in "ab"]
    timing.measure(runners, CPU, 1e-9)
    assert order[2:] == ["a", "b", "b", "a", "a", "b"]
    assert all(len(runner.samples["forward"]) == timing.LEAST_ROUNDS for runner in runners)
    assert timing.ratios([2.0, 4.0, 9.0], [1.0, 1.0, 3.0])[1] == 3.0


class _Ticks(timing.Clock):
    """A clock that ticks once a look."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.now = 0.0

    def mark(self) -> float:
        self.now += 1e-3
        return self.now


def test_nested_parts_take_their_own_time() -> None:
    clock = PartClock(_Ticks())
    x = torch.ones(2, requires_grad=True)
    inner = wrap(lambda t: t * 2, "dmwla", clock)
    outer = wrap(lambda t: inner(t) + 1, "decoder", clock)
    clock.start()
    outer(x).sum().backward()
    clock.rest()
    found = clock.stop()
    # Forward: before and after the inner call; backward likewise.
    assert found["dmwla"] == pytest.approx(2)
    assert found["decoder"] == pytest.approx(4)
    assert torch.equal(x.grad, torch.full((2,), 2.0))


def row(median: float, spread: float, **other: object) -> Row:
    values = {"median_ms": median, "p20_ms": median - spread, "p80_ms": median + spread, **other}
    return Row("context_attention", "asked", "", 1, "portable", "forward", dict(SIZES), "float32", **values)


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [(row(10, 1), row(10.5, 1), "noise"), (row(10, 1), row(5, 1), "faster"), (row(10, 1), row(20, 1), "slower")],
)
def test_noise_is_called_noise(before: Row, after: Row, verdict: str) -> None:
    found = compare.difference(before, after)
    assert found.verdict == verdict
    assert found.low <= found.ratio <= found.high


def test_compare_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    environment = {"cpu": "x", "torch": "y"}
    write_jsonl(tmp_path / "a.jsonl", [row(10, 1, environment=environment)])
    write_jsonl(tmp_path / "b.jsonl", [row(5, 1, environment={**environment, "cpu": "z"})])
    assert main(["bench", "--compare", str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]) == 0
    printed = capsys.readouterr().out
    assert "1 became faster, 0 slower" in printed
    assert "The machines differ (cpu)" in printed
    assert "2x" in printed


def test_compare_bad_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--compare", "no-such-file", "nor-this"]) == 2
    assert "expected a result file" in capsys.readouterr().err
    (tmp_path / "c.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(ConfigError, match="not the result of a benchmark"):
        read_jsonl(tmp_path / "c.jsonl")


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A copy of the package with two commits; the second calls itself version 9.9."""
    folder = tmp_path / "clone"
    source = compare.ROOT / "simmp_fast"
    shutil.copytree(source, folder / "simmp_fast", ignore=shutil.ignore_patterns("__pycache__"))

    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=x", "-c", "user.email=x@y", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)

    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "one")
    text = (source / "__init__.py").read_text()
    (folder / "simmp_fast" / "__init__.py").write_text(f'{text}\n__version__ = "9.9"\n')
    git("commit", "-qam", "two")
    return folder


def test_a_revision_is_measured_by_this_benchmark(clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parser = argparse.ArgumentParser()
    command.add_options(parser)
    options = vars(parser.parse_args(["window_similarity", "--fast", "--device", "cpu", "--seconds", "0.01"]))
    selection = {name: value for name, value in options.items() if name not in ("out", "list", "compare", "merge")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "ROOT", clone)
        tree = compare._unpack("HEAD", tmp_path / "tree")
    rows = compare._measure(tree, "0123456789abcdef", selection, tmp_path / "out")
    assert {row.environment["simmp_fast"] for row in rows} == {"9.9"}
    assert {row.environment["commit"] for row in rows} == {"0123456789ab"}
    assert not (clone / ".git" / "worktrees").exists()


def test_compare_revisions_takes_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []

    def measured(tree: Path, commit: str, *rest: object) -> list[Row]:
        taken.append(commit)
        return [row(10, 1, samples_ms=[9.0, 10.0, 11.0], environment={"cpu": "x"})]

    monkeypatch.setattr(compare, "_commit", lambda name: name)
    monkeypatch.setattr(compare, "_unpack", lambda commit, folder: folder)
    monkeypatch.setattr(compare, "_measure", measured)
    text = compare.compare(("one", "two"), {}, lambda message: None)
    assert taken == ["one", "two", "one", "two"]
    assert "1 differ by no more than noise" in text
