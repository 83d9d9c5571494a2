"""The search for faster configurations, and the file that keeps what it measured; no GPU is needed."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from simmp_fast.kernels import candidates, configs, tune
from simmp_fast.kernels.aot import Case, Resources, compiled_kernel
from simmp_fast.kernels.apart import isolated, one_by_one
from simmp_fast.kernels.configs import VERSION, Config, forced, lookup, pick, register_table
from simmp_fast.kernels.measure import agree, judged
from simmp_fast.kernels.search import Descent, Subject, Target, key, neighbours, plan, row_text

START = Config("made_up", "half", 96, ((9, 0),), {"BLOCK_M": 64, "BLOCK_N": 64}, 4, 2, 1024, 0, "ahead-of-time")


def cost(config: Config) -> float | None:
    """Least at BLOCK_M=128, BLOCK_N=32, 8 warps, 3 stages; BLOCK_M=256 cannot be used."""
    if config.tiles["BLOCK_M"] == 256:
        return None
    best = {"BLOCK_M": 128, "BLOCK_N": 32}
    tiles = sum(abs(config.tiles[name].bit_length() - size.bit_length()) for name, size in best.items())
    return 1.0 + tiles + abs(config.warps - 8) / 4 + abs(config.stages - 3)


SUBJECT = Subject("made_up", "half", 96)
OTHER = Subject("made_up", "half", 192)
TARGET = Target(0, (9, 0), 227 * 1024)


def compiled(subject: Subject, config: Config, target: Target, end: float) -> Config | str:
    return "does not compile" if cost(config) is None else replace(config, shared=2048)


def timed(
    subject: Subject, configs: Sequence[Config], start: Config, target: Target, end: float
) -> Iterator[tuple[Config, float | str]]:
    for config in configs:
        yield config, cost(config) or 0.0


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A table of the made-up kernel alone."""
    monkeypatch.setattr(configs, "_TABLES", {"made_up": [START, replace(START, width=192)]})
    lookup.cache_clear()
    yield
    lookup.cache_clear()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "measured.txt"
    path.write_text("# a comment\n", encoding="utf-8")
    return path


def test_the_descent_reaches_the_least_cost(table: None, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ends = tune.tune([SUBJECT], TARGET, jobs=3, compile=compiled, time_each=timed, note="a device", path=file)
    end = ends[SUBJECT]
    assert (end.best.tiles, end.best.warps, end.best.stages) == ({"BLOCK_M": 128, "BLOCK_N": 32}, 8, 3)
    assert (end.time, end.first) == (1.0, cost(START))
    row = file.read_text(encoding="utf-8").splitlines()[-1]
    assert row == f"made_up half 96 9.0@{VERSION} BLOCK_M=128,BLOCK_N=32 8 3 2 0 measured # 5.00x, a device"
    assert "does not compile" in capsys.readouterr().err


def test_no_candidate_is_tried_twice(table: None, file: Path) -> None:
    seen: list[tuple[object, ...]] = []

    def watching(subject: Subject, config: Config, target: Target, end: float) -> Config | str:
        seen.append(key(config))
        return compiled(subject, config, target, end)

    tune.tune([SUBJECT], TARGET, compile=watching, time_each=timed, path=file)
    assert len(seen) == len(set(seen)) > 10
    assert key(START) not in seen


def test_noise_is_no_gain(table: None, file: Path) -> None:
    def barely(subject: Subject, configs: Sequence[Config], start: Config, *_: Any) -> Iterator[tuple[Config, float]]:
        yield from ((config, 1.0 if config is start else 0.99) for config in configs)

    ends = tune.tune([SUBJECT], TARGET, compile=compiled, time_each=barely, path=file)
    assert ends[SUBJECT].best is START
    assert file.read_text(encoding="utf-8") == "# a comment\n"


def test_of_several_that_gain_the_fastest_is_taken() -> None:
    descent = Descent(START)
    descent.begin(1.0)
    first, second, third = list(neighbours(START))[:3]
    assert [descent.take(first, 0.97), descent.take(second, 0.969), descent.take(third, 0.97)] == [True, True, False]
    assert descent.best is second
    descent.begin(0.969)
    assert not descent.take(third, 0.96)
    assert descent.first == 1.0


def test_nothing_begins_after_its_time(table: None, file: Path) -> None:
    assert tune.tune([SUBJECT], TARGET, seconds=0.0, compile=compiled, time_each=timed, path=file) == {}
    assert tune.time_candidates({SUBJECT: [START]}, TARGET, seconds=0.0, time_each=timed, path=file) == {}


def test_the_time_bounds_the_first_round_too(table: None, file: Path) -> None:
    """Compilation that takes too long is not waited for, and what was found before is kept."""
    asked: list[Subject] = []

    def slow(subject: Subject, config: Config, target: Target, end: float) -> Config | str:
        asked.append(subject)
        if subject == OTHER:
            time.sleep(max(0.0, end - time.monotonic()))
        return compiled(subject, config, target, end)

    ends = tune.tune([SUBJECT, OTHER], TARGET, seconds=1.0, compile=slow, time_each=timed, path=file)
    assert list(ends) == [SUBJECT]
    assert ends[SUBJECT].time == 1.0
    assert asked[-1] == OTHER
    assert "made_up half 96" in file.read_text(encoding="utf-8")


def test_rows_are_kept_in_the_midst_of_a_round(table: None, file: Path) -> None:
    def cut(subject: Subject, configs: Sequence[Config], *rest: Any) -> Iterator[tuple[Config, float | str]]:
        yield configs[0], 1.0
        yield configs[1], "does not run"
        yield configs[2], 0.5
        raise KeyboardInterrupt

    three = list(neighbours(START))[:3]
    with pytest.raises(KeyboardInterrupt):
        tune.time_candidates({SUBJECT: three}, TARGET, time_each=cut, path=file)
    assert row_text(three[1], (9, 0), "2.00x") in file.read_text(encoding="utf-8")


def test_a_row_that_cannot_run_is_named_and_the_others_go_on(
    table: None, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(subject: Subject, configs: Sequence[Config], *rest: Any) -> Iterator[tuple[Config, float | str]]:
        if subject == OTHER:
            yield configs[0], "does not run (RuntimeError: no memory)"
        else:
            yield from timed(subject, configs, *rest)

    ends = tune.tune([OTHER, SUBJECT], TARGET, compile=compiled, time_each=failing, path=file)
    assert list(ends) == [SUBJECT]
    said = capsys.readouterr().err
    assert "made_up half 192: the row in use cannot run (does not run (RuntimeError: no memory))" in said


def _answers(items: Sequence[int], what: str) -> Iterator[str]:
    """One answer an item: -1 raises, -2 ends the process, -3 takes a minute."""
    for item in items:
        if item == -1:
            raise RuntimeError("an illegal memory access was encountered\nCUDA kernel errors ...")
        if item == -2:
            os._exit(7)
        if item == -3:
            time.sleep(60)
        yield f"{what} {item} {os.getpid()}"


def test_one_bad_item_costs_no_other() -> None:
    found = list(one_by_one(_answers, [1, 2, -1, 3, -2, -2, 4], "item"))
    assert [item for item, _ in found] == [1, 2, -1, 3, -2, -2, 4]
    assert found[2][1] == "does not run (RuntimeError: an illegal memory access was encountered"
    assert found[4][1] == found[5][1] == "ends its process (exit status 7)"
    good = [answer.split() for item, answer in found if item > 0]
    assert [words[1] for words in good] == ["1", "2", "3", "4"]
    assert good[0][2] == good[1][2] != good[2][2] != good[3][2]


def test_an_item_that_hangs_is_given_up_and_the_end_is_the_end() -> None:
    given_up = (-3, "takes more than 2 seconds")
    assert list(one_by_one(_answers, [-3, -3], "item", seconds=2.0)) == [given_up, given_up]
    assert list(one_by_one(_answers, [-3], "item", seconds=50.0, end=time.monotonic() + 2.0)) == []


def test_what_a_process_of_its_own_answers() -> None:
    assert isolated(abs, -3) == 3
    assert str(isolated(len, 3)).startswith("does not run (TypeError: ")
    assert isolated(os._exit, 7) == "ends its process (exit status 7)"
    assert isolated(time.sleep, 60, seconds=0.2) == "takes more than 0.2 seconds"


def test_a_candidate_is_judged_by_its_machine_code() -> None:
    """Of the smallest kernel, for a device that this machine need not have."""
    start = lookup("window_similarity", "half", 128, (9, 0), TARGET.limit)
    built = compiled_kernel(Case("window_similarity", "bfloat16", start, (9, 0)))
    found = judged(start, "any", built, TARGET)
    assert isinstance(found, Config)
    assert (found.stack, found.tiles) == (0, start.tiles)
    assert 1024 <= found.shared <= start.shared
    small = judged(start, "any", built, replace(TARGET, limit=0))
    assert isinstance(small, str)
    assert "bytes of shared memory, its row says 0" in small


def test_neighbours_are_a_step_away() -> None:
    """One number differs, or a tile and the warps that share it, both doubled or both halved."""
    steps = []
    for other in neighbours(START):
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
    assert len({key(other) for other in neighbours(START)}) == len(steps)


def test_a_measured_row_replaces_an_older_one_and_comes_first_on_its_device(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(configs, "_TABLES", {})
    tune.keep(row_text(replace(START, stages=1), (9, 0), "old"), file)
    tune.keep(row_text(START, (8, 0), "another device"), file)
    tune.keep(row_text(replace(START, stages=3), (9, 0), "another Triton", "1.5"), file)
    tune.keep(row_text(replace(START, stages=4, shared=70_000), (9, 0), "1.2x, a device"), file)
    assert len(file.read_text(encoding="utf-8").splitlines()) == 4
    register_table("made_up half 96 all BLOCK_M=64,BLOCK_N=64 4 2 1 0 ahead-of-time\n" + file.read_text())
    lookup.cache_clear()
    assert lookup("made_up", "half", 96, (9, 0), 227 * 1024).stages == 4
    assert lookup("made_up", "half", 96, (9, 0), 227 * 1024, "1.5").stages == 3
    assert lookup("made_up", "half", 96, (9, 0), 227 * 1024, "1.6").provenance == "ahead-of-time"
    assert lookup("made_up", "half", 96, (9, 0), 64 * 1024).provenance == "ahead-of-time"
    assert lookup("made_up", "half", 96, (12, 0), 99 * 1024).provenance == "ahead-of-time"
    lookup.cache_clear()


def test_the_file_of_measured_rows_may_be_a_new_one(tmp_path: Path) -> None:
    tune.keep(row_text(START, (9, 0), "1.2x"), tmp_path / "rows.txt")
    assert (tmp_path / "rows.txt").read_text(encoding="utf-8") == row_text(START, (9, 0), "1.2x") + "\n"


NEEDS = Resources(128, 0, 2048, {})


def compiled_some(
    subject: Subject, configs: Sequence[Config], target: Target, end: float
) -> Iterator[tuple[Config, tuple[Config | str, Resources] | str]]:
    for config in configs:
        if config.stages == 1:
            yield config, "ends its process (exit status -6)"
        elif config.warps == 8:
            yield config, ("stack of 8 bytes, allowed 0", NEEDS)
        else:
            yield config, (replace(config, shared=2048), NEEDS)


@pytest.fixture
def one_code(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The made-up kernel has no source."""
    monkeypatch.setattr(candidates, "fingerprint", lambda case: f"code of {case.kernel}")
    candidates._origin.cache_clear()
    yield
    candidates._origin.cache_clear()


def test_candidates_are_written_as_they_are_found_and_a_cut_run_goes_on(
    table: None, one_code: None, tmp_path: Path
) -> None:
    path, asked = tmp_path / "candidates.jsonl", []

    def cut(subject: Subject, configs: Sequence[Config], *rest: Any) -> Iterator[Any]:
        asked.append(len(configs))
        yield from list(compiled_some(subject, configs, *rest))[:4]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        candidates.precompile([SUBJECT], TARGET, path, compile_each=cut)
    assert len(path.read_text(encoding="utf-8").splitlines()) == 4
    with path.open("a", encoding="utf-8") as file:
        file.write('{"kernel": "made')
    new, usable = candidates.precompile([SUBJECT], TARGET, path, compile_each=compiled_some)
    assert new == asked[0] - 4
    assert 0 < usable < new
    assert candidates.precompile([SUBJECT], TARGET, path, compile_each=compiled_some) == (0, 0)
    found = candidates.candidates_of(path, [OTHER, SUBJECT], TARGET)
    assert list(found) == [SUBJECT]
    expected = [c for c in neighbours(START) if c.warps == 4 and c.stages > 1]
    assert {key(c) for c in found[SUBJECT]} == {key(c) for c in expected}
    assert {(c.shared, c.stack, c.provenance) for c in found[SUBJECT]} == {(2048, 0, "ahead-of-time")}
    line = json.loads(path.read_text(encoding="utf-8").splitlines()[0])
    assert (line["registers"], line["capability"], line["triton"]) == (128, "9.0", VERSION)


def test_candidates_of_another_device_compiler_or_code_are_left_out(
    table: None, one_code: None, tmp_path: Path
) -> None:
    path = tmp_path / "candidates.jsonl"
    candidates.precompile([SUBJECT], TARGET, path, compile_each=compiled_some)
    text = path.read_text(encoding="utf-8")
    assert candidates.candidates_of(path, [SUBJECT], Target(0, (8, 0), TARGET.limit)) == {}
    for old, new in ((f'"triton": "{VERSION}"', '"triton": "1.5"'), ("code of made_up", "other code")):
        path.write_text(text.replace(old, new), encoding="utf-8")
        assert candidates.candidates_of(path, [SUBJECT], TARGET) == {}


def test_candidates_are_timed_row_by_row(table: None, file: Path) -> None:
    order: list[Subject] = []

    def watching(subject: Subject, configs: Sequence[Config], *rest: Any) -> Iterator[tuple[Config, float | str]]:
        order.append(subject)
        yield from timed(subject, configs, *rest)

    some = [c for c in neighbours(START) if cost(c) is not None]
    wider = [replace(config, width=192) for config in some]
    ends = tune.time_candidates({OTHER: wider, SUBJECT: some}, TARGET, time_each=watching, note="a", path=file)
    assert order == [OTHER, SUBJECT]
    assert ends[SUBJECT].time == min(cost(c) or 9.0 for c in some)
    assert [line.split()[2] for line in file.read_text(encoding="utf-8").splitlines()[1:]] == ["192", "96"]


def test_the_most_important_rows_come_first() -> None:
    names = [str(s) for s in plan([], ["half"], ["update_write:128", "context_forward", "context_backward_query:96"])]
    assert names[:6] == [
        "update_write any 128", *(f"context_forward half {width}" for width in (96, 128, 192, 256)),
        "context_backward_query half 96",
    ]  # fmt: skip
    assert sorted(names) == sorted(str(s) for s in plan([], ["half"]))
    named = [s.kernel for s in plan(["update_fold", "context_forward"], ["half"])]
    assert named[:2] == ["update_fold", "context_forward"]
    with pytest.raises(ValueError, match="--first: got 'context_forward:97'"):
        list(plan([], ["half"], ["context_forward:97"]))


def test_a_forced_configuration_is_taken() -> None:
    device = torch.device("cpu")
    usual = pick("window_similarity", "float32", 96, device)
    other = replace(usual, warps=2)
    with forced(other):
        assert pick("window_similarity", "float32", 96, device) is other
    assert pick("window_similarity", "float32", 96, device) == usual


def test_results_agree_up_to_rounding() -> None:
    x = torch.randn(100)
    assert agree([x * (1 + 1e-7)], [x])
    assert not agree([x * 1.01], [x])
    assert not agree([torch.tensor([1])], [torch.tensor([2])])


def test_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert tune.main(["context_forward", "--dtype", "half", "--dry-run"]) == 0
    assert capsys.readouterr().out.split()[:3] == ["context_forward", "half", "96"]
    assert tune.main(["nothing"]) == 2
    assert "kernel: got 'nothing', expected some of" in capsys.readouterr().err
    assert tune.main(["--candidates", "nowhere"]) == 2
    assert "got nowhere, which is no file" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main([]) == 1
    assert "no CUDA device is present" in capsys.readouterr().err
