"""The search for faster configurations, and the file that keeps what it measured; no GPU is needed."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from simmp_fast.kernels import configs, tune
from simmp_fast.kernels.aot import Case, compiled_kernel
from simmp_fast.kernels.configs import Config, forced, lookup, pick, register_table

START = Config("made_up", "half", 96, ((9, 0),), {"BLOCK_M": 64, "BLOCK_N": 64}, 4, 2, 1024, 0, "ahead-of-time")


def cost(config: Config) -> float | None:
    """Least at BLOCK_M=128, BLOCK_N=32, 8 warps, 3 stages; BLOCK_M=256 cannot be used."""
    if config.tiles["BLOCK_M"] == 256:
        return None
    best = {"BLOCK_M": 128, "BLOCK_N": 32}
    tiles = sum(abs(config.tiles[name].bit_length() - size.bit_length()) for name, size in best.items())
    return 1.0 + tiles + abs(config.warps - 8) / 4 + abs(config.stages - 3)


SUBJECT = tune.Subject("made_up", "half", 96)
TARGET = tune.Target(0, (9, 0), 227 * 1024)


def compiled(subject: tune.Subject, config: Config, target: tune.Target) -> Config | str:
    return "does not compile" if cost(config) is None else replace(config, shared=2048)


def timed(
    subject: tune.Subject, candidates: Sequence[Config], start: Config, target: tune.Target
) -> list[tuple[Config, float]]:
    return [(config, cost(config) or 0.0) for config in (start, *candidates)]


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A table of the made-up kernel alone."""
    monkeypatch.setattr(configs, "_TABLES", {"made_up": [START]})
    lookup.cache_clear()
    yield
    lookup.cache_clear()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "measured.txt"
    path.write_text("# a comment\n", encoding="utf-8")
    return path


def test_the_descent_reaches_the_least_cost(table: None, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ends = tune.tune([SUBJECT], TARGET, jobs=3, compile=compiled, time_them=timed, note="a device", path=file)
    end = ends[SUBJECT]
    assert (end.best.tiles, end.best.warps, end.best.stages) == ({"BLOCK_M": 128, "BLOCK_N": 32}, 8, 3)
    assert (end.time, end.first) == (1.0, cost(START))
    row = file.read_text(encoding="utf-8").splitlines()[-1]
    assert row == "made_up half 96 9.0 BLOCK_M=128,BLOCK_N=32 8 3 2 0 measured # 5.00x, a device"
    assert "does not compile" in capsys.readouterr().err


def test_no_candidate_is_tried_twice(table: None, file: Path) -> None:
    seen: list[tuple[object, ...]] = []

    def watching(subject: tune.Subject, config: Config, target: tune.Target) -> Config | str:
        seen.append(tune._key(config))
        return compiled(subject, config, target)

    tune.tune([SUBJECT], TARGET, compile=watching, time_them=timed, path=file)
    assert len(seen) == len(set(seen)) > 10
    assert tune._key(START) not in seen


def test_noise_is_no_gain(table: None, file: Path) -> None:
    def barely(subject: tune.Subject, candidates: Sequence[Config], start: Config, target: tune.Target) -> list:
        return [(start, 1.0), *((config, 0.99) for config in candidates)]

    ends = tune.tune([SUBJECT], TARGET, compile=compiled, time_them=barely, path=file)
    assert ends[SUBJECT].best is START
    assert file.read_text(encoding="utf-8") == "# a comment\n"


def test_no_round_begins_after_its_time(table: None, file: Path) -> None:
    ends = tune.tune([SUBJECT], TARGET, seconds=0.0, compile=compiled, time_them=timed, path=file)
    assert ends[SUBJECT].best is START


def test_a_row_that_cannot_run_is_named_and_the_others_go_on(
    table: None, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tune.Subject("made_up", "half", 64)

    def failing(subject: tune.Subject, *rest: Any) -> list[tuple[Config, float]]:
        if subject == broken:
            raise RuntimeError("no memory")
        return timed(subject, *rest)

    ends = tune.tune([broken, SUBJECT], TARGET, compile=compiled, time_them=failing, path=file)
    assert list(ends) == [SUBJECT]
    assert "made_up half 64: the row in use cannot run (RuntimeError: no memory)" in capsys.readouterr().err


def test_what_a_process_of_its_own_answers() -> None:
    assert tune.isolated(abs, -3) == 3
    assert tune.isolated(len, 3) == "does not run (TypeError)"
    assert tune.isolated(os._exit, 7) == "ends its process (exit status 7)"
    assert tune.isolated(time.sleep, 60, seconds=0.2) == "takes more than 0.2 seconds"


def test_a_candidate_is_judged_by_its_machine_code() -> None:
    """Of the smallest kernel, for a device that this machine need not have."""
    start = lookup("window_similarity", "half", 128, (9, 0), TARGET.limit)
    built = compiled_kernel(Case("window_similarity", "bfloat16", start, (9, 0)))
    found = tune.judged(start, "any", built, TARGET)
    assert isinstance(found, Config)
    assert (found.stack, found.tiles) == (0, start.tiles)
    assert 1024 <= found.shared <= start.shared
    small = tune.judged(start, "any", built, replace(TARGET, limit=0))
    assert isinstance(small, str)
    assert "bytes of shared memory, its row says 0" in small


def test_neighbours_are_a_step_away() -> None:
    """One number differs, or a tile and the warps that share it, both doubled or both halved."""
    steps = []
    for other in tune.neighbours(START):
        changed = {name: (size, other.tiles[name]) for name, size in START.tiles.items() if other.tiles[name] != size}
        warps, stages = other.warps / START.warps, other.stages - START.stages
        ratios = [new / old for old, new in changed.values()]
        steps.append((ratios, warps, stages))
        assert len(ratios) + (stages != 0) <= 1
        assert not ratios or warps in (1, ratios[0])
        assert not stages or warps == 1
        assert replace(other, tiles=START.tiles, warps=START.warps, stages=START.stages) == START
    assert ([2.0], 2.0, 0) in steps
    assert ([0.5], 1.0, 0) in steps
    assert ([], 2.0, 0) in steps
    assert ([], 1.0, 1) in steps
    assert len({tune._key(other) for other in tune.neighbours(START)}) == len(steps)


def test_a_measured_row_replaces_an_older_one_and_comes_first_on_its_device(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(configs, "_TABLES", {})
    tune.keep(tune.row_text(replace(START, stages=1), (9, 0), "old"), file)
    tune.keep(tune.row_text(START, (8, 0), "another device"), file)
    tune.keep(tune.row_text(replace(START, stages=4, shared=70_000), (9, 0), "1.2x, a device"), file)
    assert len(file.read_text(encoding="utf-8").splitlines()) == 3
    register_table("made_up half 96 all BLOCK_M=64,BLOCK_N=64 4 2 1 0 ahead-of-time\n" + file.read_text())
    lookup.cache_clear()
    assert lookup("made_up", "half", 96, (9, 0), 227 * 1024).stages == 4
    assert lookup("made_up", "half", 96, (9, 0), 64 * 1024).provenance == "ahead-of-time"
    assert lookup("made_up", "half", 96, (12, 0), 99 * 1024).provenance == "ahead-of-time"
    lookup.cache_clear()


def test_a_forced_configuration_is_taken() -> None:
    device = torch.device("cpu")
    usual = pick("window_similarity", "float32", 96, device)
    other = replace(usual, warps=2)
    with forced(other):
        assert pick("window_similarity", "float32", 96, device) is other
    assert pick("window_similarity", "float32", 96, device) == usual


def test_results_agree_up_to_rounding() -> None:
    x = torch.randn(100)
    assert tune._agree([x * (1 + 1e-7)], [x])
    assert not tune._agree([x * 1.01], [x])
    assert not tune._agree([torch.tensor([1])], [torch.tensor([2])])


def test_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert tune.main(["context_forward", "--dtype", "half", "--dry-run"]) == 0
    assert capsys.readouterr().out.split()[:3] == ["context_forward", "half", "96"]
    assert tune.main(["nothing"]) == 2
    assert "kernel: got 'nothing', expected some of" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main([]) == 1
    assert "no CUDA device is present" in capsys.readouterr().err
