"""Failures are rows, parity guards speed-ups, memory is counted, noise is called noise."""

from __future__ import annotations

import argparse
import shutil
import subprocess
from pathlib import Path

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


def test_an_interrupted_run_gives_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    first, kept = row(10, 1), []

    def measured(case: Case, settings: Settings) -> list[Row]:
        if kept_back:
            return [kept_back.pop()]
        raise KeyboardInterrupt

    kept_back = [first]
    monkeypatch.setattr(run, "rows_of", measured)
    with pytest.raises(KeyboardInterrupt):
        run.run([CASE, CASE], Settings(CPU, fast=True), interrupted=kept.extend)
    assert kept == [first]


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
