"""One form of the training step in a process of its own: its row is there at once, whatever comes after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tape import TapeRecorder

from bench import form, memory, network, profile
from bench.backends import Backend
from bench.measure import Settings
from bench.rows import FAILED, NOT_CHECKED, OK, OUT_OF_MEMORY, PASSED, RESULTS, Row, read_jsonl
from bench.steps import Steps
from simmp_fast.cli import main

CPU = torch.device("cpu")
TINY = ["--device", "cpu", "--side", "64", "--batch", "1", "--dtype", "float32", "--steps", "2", "--warmup", "1"]


@pytest.fixture(autouse=True)
def operations_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """To count them takes longer than all the rest."""
    monkeypatch.setattr(network, "_forward_operations", lambda config: 10**9)


@pytest.fixture
def peak_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU's peak comes from its profiler, which is slow."""
    monkeypatch.setattr(memory, "peak_bytes", lambda call, device: 1)


def command(out: Path, backend: str, *options: str) -> int:
    return form.main([*TINY, "--backend", backend, "--out", str(out), *options])


def test_rows_of_two_forms_make_one_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(tmp_path, "portable") == 0
    assert "ms a step" in capsys.readouterr().out
    assert command(tmp_path / "alone", "reference", "--no-parity") == 0
    (row,), (usual,) = read_jsonl(tmp_path), read_jsonl(tmp_path / "alone")
    assert (row.operator, row.group, row.direction, row.status) == ("training_step", "step", "both", OK)
    assert row.shape == {"B": 1, "side": 64}
    assert len(row.samples_ms) == 2
    assert min(row.samples_ms) <= row.p20_ms <= row.median_ms <= row.p80_ms <= max(row.samples_ms)
    assert row.rate == pytest.approx(1e3 / row.median_ms)
    assert row.peak_bytes > 0
    assert row.flops == 3 * 10**9
    assert (row.parity, usual.parity, row.speedup) == (PASSED, PASSED, None)

    folders = [str(tmp_path), str(tmp_path / "alone")]
    assert main(["bench", "--merge", *folders, "--out", str(tmp_path / "both")]) == 0
    merged = {row.backend: row for row in read_jsonl(tmp_path / "both")}
    assert merged["portable"].speedup == pytest.approx(usual.median_ms / row.median_ms)
    assert merged["portable"].speedup_p20 is None
    assert merged["reference"].speedup is None
    assert "x (medians) |" in (tmp_path / "both" / "report.md").read_text()


@pytest.mark.usefixtures("peak_known")
def test_the_row_is_there_before_the_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Row] = []

    def listen(*arguments: Any) -> None:
        seen.extend(read_jsonl(tmp_path))
        raise RuntimeError("no profiler here")

    monkeypatch.setattr(profile, "listen", listen)
    assert command(tmp_path, "portable", "--profile", "--no-parity") == 0
    assert [(row.status, row.parity) for row in seen] == [(OK, NOT_CHECKED)]
    (row,) = read_jsonl(tmp_path)
    assert row.median_ms == seen[0].median_ms
    assert row.message == "profile: RuntimeError: no profiler here"


@pytest.mark.usefixtures("peak_known")
def test_the_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = profile.summarise([profile.Interval("kernel", 0, 10)], 1)
    monkeypatch.setattr(profile, "listen", lambda take, device, count: found)
    assert command(tmp_path, "portable", "--profile", "--no-parity") == 0
    text = (tmp_path / "profile-portable-float32.md").read_text()
    assert text.startswith("# Training step, portable, float32, batch 1")
    assert "| `kernel` |  | 1 |" in text
    assert (tmp_path / "profile-portable-float32.json").exists()


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), OUT_OF_MEMORY, "memory ran out (take the first step)"),
        (RuntimeError("CUDA error: illegal"), FAILED, "RuntimeError: CUDA error: illegal (take the first step)"),
    ],
)
def test_a_failure_is_a_row(
    error: Exception, status: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(steps: Steps, backend: Backend) -> torch.Tensor:
        raise error

    monkeypatch.setattr(Steps, "take", fail)
    assert command(tmp_path, "portable") == 1
    (row,) = read_jsonl(tmp_path)
    assert (row.status, row.message, row.median_ms) == (status, message, None)


def test_an_interrupted_form_leaves_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(steps: Steps, backend: Backend) -> torch.Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(Steps, "take", stop)
    with pytest.raises(KeyboardInterrupt):
        command(tmp_path, "portable")
    (row,) = read_jsonl(tmp_path)
    assert (row.status, row.message) == (FAILED, "KeyboardInterrupt:  (take the first step)")


def test_a_loss_that_is_no_number_has_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = network.make

    def spoiled(*arguments: Any) -> network.Network:
        made = right(*arguments)
        made.images.fill_(float("nan"))
        return made

    monkeypatch.setattr(network, "make", spoiled)
    assert command(tmp_path, "portable") == 1
    (row,) = read_jsonl(tmp_path)
    assert row.status == FAILED
    assert "the loss is nan" in row.message


@pytest.mark.usefixtures("peak_known")
def test_a_replayed_form_is_timed_as_a_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    def steps(made: network.Network) -> Steps:
        return Steps(made.model, made.images, made.labels, made.autocast, TapeRecorder)

    monkeypatch.setattr(network.Network, "steps", steps)
    backend = Backend("portable-graph", "portable", replayed=True)
    said: list[str] = []
    made = form.Form(backend, form.case_of(CPU, 1, 64), Settings(CPU), said.append)
    kept: list[Row] = []
    row = made.measure(form.Plan(steps=2, warmup=1, parity=False), kept.append)
    recorder = made.steps.of(backend).replays.recorder
    assert (recorder.captures, recorder.replays) == (1, 1 + 1 + 2)  # reached, warm-up, timed
    assert [r.flops for r in kept] == [None, None]  # against the clock: no operations are counted
    assert row == kept[-1]
    assert row.peak_bytes > 0
    assert said[-1] == "count launches and waits"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("triton-graph",), "'triton-graph' cannot run here"),
        (("sdpa",), "got 'sdpa', which has no training_step"),
        (("portable", "--steps", "0"), "--steps: got 0, expected at least 1"),
    ],
)
def test_wrong_arguments(
    options: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(tmp_path, *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / RESULTS).exists()
