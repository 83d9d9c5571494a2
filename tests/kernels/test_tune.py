"""The search for faster configurations, and the file that keeps what it measured; no GPU is needed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from simmp_fast.kernels import configs, tune
from simmp_fast.kernels.configs import Config, forced, lookup, pick, register_table

START = Config("made_up", "half", 96, ((9, 0),), {"BLOCK_M": 64, "BLOCK_N": 64}, 4, 2, 1024, 0, "ahead-of-time")


def cost(config: Config) -> float | None:
    """Least at BLOCK_M=128, BLOCK_N=32, 8 warps, 3 stages; BLOCK_M=256 cannot be used."""
    if config.tiles["BLOCK_M"] == 256:
        return None
    best = {"BLOCK_M": 128, "BLOCK_N": 32}
    tiles = sum(abs(config.tiles[name].bit_length() - size.bit_length()) for name, size in best.items())
    return 1.0 + tiles + abs(config.warps - 8) / 4 + abs(config.stages - 3)


def test_the_search_reaches_the_least_cost() -> None:
    seen: list[tuple[object, ...]] = []

    def measure(config: Config) -> float | None:
        seen.append(tune._key(config))
        return cost(config)

    best, time, first = tune.search(START, measure)
    assert (best.tiles, best.warps, best.stages) == ({"BLOCK_M": 128, "BLOCK_N": 32}, 8, 3)
    assert (time, first) == (1.0, cost(START))
    assert len(seen) == len(set(seen))


def test_noise_is_no_gain() -> None:
    times = iter([1.0] + [0.99] * 100)
    best, _, _ = tune.search(START, lambda _: next(times))
    assert best is START


def test_a_start_that_cannot_run_is_an_error() -> None:
    with pytest.raises(ValueError, match="made_up: the configuration in use cannot run"):
        tune.search(START, lambda _: None)


def test_neighbours_differ_in_one_number() -> None:
    for other in tune.neighbours(START):
        pairs = [(other.tiles[name], size) for name, size in START.tiles.items()]
        pairs += [(other.warps, START.warps), (other.stages, START.stages)]
        assert sum(a != b for a, b in pairs) == 1
        assert replace(other, tiles=START.tiles, warps=START.warps, stages=START.stages) == START


def test_a_measured_row_replaces_an_older_one_and_comes_first_on_its_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(configs, "_TABLES", {})
    file = tmp_path / "measured.txt"
    file.write_text("# a comment\n", encoding="utf-8")
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
