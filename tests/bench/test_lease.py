"""The lease with stand-ins for its programs: what is kept, however a call ends, and how the next one goes on."""

from __future__ import annotations

import json
import os
import signal
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bench import form
from bench.backends import BACKENDS
from bench.lease import __main__ as command
from bench.lease import table
from bench.lease.execute import MOST_FILES, RECORD, RESULTS, TESTS, Runner, done_before
from bench.lease.plan import CALLS, Call, Stage
from bench.lease.record import Mirror, append, read
from bench.lease.rehearse import faults
from simmp_fast.cli import main as simmp_fast
from simmp_fast.kernels import tune

ROOT = Path(__file__).parents[2]
STAGES = [stage for call in CALLS.values() for wave in call.waves for stage in wave]
# Writes rows and test lines one after the other, as the real programs do.
ROWS = """
import json, os, sys, time
for i in range(int(sys.argv[2])):
    for path in (sys.argv[1] + "/results.jsonl", os.environ["SIMMP_FAST_TEST_LOG"]):
        with open(path, "a") as file:
            file.write(json.dumps({"test": f"x::test_{i}", "outcome": "passed", "n": i, "pad": "-" * 500}) + "\\n")
    print("row", i, flush=True)
    time.sleep(float(sys.argv[3]))
"""


def writes(name: str, rows: int, pause: float = 0.0, seconds: float = 30) -> Stage:
    return Stage(name, ("{python}", "-c", ROWS, "{here}", str(rows), str(pause)), seconds, rows=True)


def says(name: str, code: str, seconds: float = 30, **more: Any) -> Stage:
    return Stage(name, ("{python}", "-c", code), seconds, **more)


@pytest.fixture(autouse=True)
def interrupts_arrive() -> Iterator[None]:
    """As in the command: what a shell puts into the background ignores SIGINT, and so do the stages it starts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def ran(tmp_path: Path) -> Callable[..., tuple[int, Path, list[str]]]:
    """Runs waves in one go; gives the exit status, the folder and what was said."""

    def call(*waves: tuple[Stage, ...], seconds: float = 60, before: set[str] = frozenset()) -> Any:  # type: ignore[assignment]
        said: list[str] = []
        runner = Runner(tmp_path / "out", tmp_path / "work", before, say=said.append)
        return runner.run(Call("call", seconds, "", waves)), tmp_path / "out", said

    return call


def endings(out: Path) -> dict[str, str]:
    return {line["stage"]: line["status"] for line in read(out / RECORD) if line["event"] == "ended"}


def test_rows_logs_and_endings_come_home(ran: Any) -> None:
    status, out, _ = ran((writes("one", 3), writes("two", 2)), (says("three", "print('hello')"),))
    assert status == 0
    assert endings(out) == {"one": "ok", "two": "ok", "three": "ok"}
    assert sorted(row["n"] for row in read(out / RESULTS)) == [0, 0, 1, 1, 2]
    assert sum(1 for _ in read(out / TESTS)) == 5
    assert "three | hello" in (out / "log.txt").read_text()
    assert len(list(out.iterdir())) <= MOST_FILES
    assert not faults(out)


def test_one_failing_stage_takes_no_other_with_it(ran: Any) -> None:
    crash = says("crash", "import os; os.kill(os.getpid(), 11)")
    missing = Stage("missing", ("no-such-program",), 5)
    status, out, said = ran((crash, missing, writes("beside", 2)), (writes("after", 2),))
    assert status == 1
    assert endings(out) == {"crash": "failed", "missing": "failed", "beside": "ok", "after": "ok"}
    assert any("no-such-program" in text for text in said)


def test_a_stage_is_stopped_at_its_limit_and_keeps_its_rows(ran: Any) -> None:
    status, out, _ = ran((writes("long", 1000, 0.05, seconds=1.0),), (writes("after", 1),))
    assert status == 1
    assert endings(out) == {"long": "cut", "after": "ok"}
    assert 2 < sum(1 for _ in read(out / RESULTS)) < 100


def test_a_stage_that_ignores_the_request_is_killed_with_its_children(ran: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("bench.lease.execute.GRACE", 0.3)
    code = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN);"
        "child = subprocess.Popen([sys.executable, '-c', 'import signal, time; "
        "signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)']); print('child', child.pid, flush=True);"
        "time.sleep(60)"
    )
    _, out, _ = ran((says("deaf", code, seconds=1.5),))
    assert endings(out) == {"deaf": "cut"}
    child = int((out / "log.txt").read_text().split()[-1])
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and Path(f"/proc/{child}/stat").exists():
        if Path(f"/proc/{child}/stat").read_text().split()[2] == "Z":
            break
        time.sleep(0.05)
    else:
        assert not Path(f"/proc/{child}").exists()


def test_a_stage_is_cut_in_time_for_the_end_of_the_call(ran: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("bench.lease.execute.RESERVE", 2.0)
    monkeypatch.setattr("bench.lease.execute.LEAST", 0.5)
    _, out, _ = ran((writes("long", 1000, 0.05),), (writes("never", 1),), seconds=4)
    assert [line["limit"] <= 4 - 2 for line in read(out / RECORD) if line["event"] == "started"] == [True]
    assert endings(out) == {"long": "cut"}
    assert [line["stages"] for line in read(out / RECORD) if line["event"] == "left"] == [["never"]]


def test_what_is_done_is_passed_over_and_the_rest_goes_on(ran: Any) -> None:
    _, out, _ = ran((writes("well", 1), says("ill", "raise SystemExit(1)")))
    assert done_before([out / RECORD]) == {"well"}
    _, out, said = ran((writes("well", 1), writes("ill", 1)), before=done_before([out / RECORD]))
    assert endings(out) == {"well": "ok", "ill": "ok"}
    assert "well: done before" in said
    assert sum(1 for _ in read(out / RESULTS)) == 2  # one of each call


def test_a_stage_that_wants_what_is_not_there_is_passed_over(ran: Any) -> None:
    _, out, said = ran((says("tuned", "", wants=("{cache}/candidates.jsonl", "a warm cache")),))
    assert endings(out) == {"tuned": "passed over"}
    assert "tuned: passed over, it wants a warm cache" in said


@pytest.mark.parametrize("number", range(20))
def test_a_call_killed_at_any_moment_leaves_whole_files(tmp_path: Path, number: int) -> None:
    """Killed without warning, and with all that it started; what it had found until the last moment is there."""
    waves = ((writes("a", 400, 0.01), writes("b", 30, 0.01)), (writes("c", 400, 0.001),))
    child = os.fork()
    if child == 0:
        os.setsid()
        from bench.lease import execute

        execute.TICK, execute.PACKED = 0.02, 0.05  # as many writes as possible to be cut in
        Runner(tmp_path / "out", tmp_path / "work", say=lambda text: None).run(Call("call", 60, "", waves))
        os._exit(0)
    time.sleep(0.1 + 0.06 * number)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    time.sleep(0.2)  # the stages die with their parent
    out = tmp_path / "out"
    assert not faults(out)
    for name in ("a", "b", "c"):
        own = tmp_path / "work" / "stages" / name / RESULTS
        if own.exists() and not any(line.get("stage") == name for line in read(out / RECORD)):
            pytest.fail(f"{name} wrote rows but was never noted as started")
    written = sum(1 for path in (tmp_path / "work" / "stages").rglob(RESULTS) for _ in read(path))
    home = sum(1 for _ in read(out / RESULTS))
    # A stand-in writes up to 100 rows a second here: what is missing was written in the last moment.
    assert home <= written <= home + 250
    before = written
    time.sleep(0.1)
    assert sum(1 for path in (tmp_path / "work" / "stages").rglob(RESULTS) for _ in read(path)) == before


def test_a_call_that_is_asked_to_end_packs_what_it_has(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        runner = Runner(tmp_path / "out", tmp_path / "work", say=lambda text: None)
        signal.signal(signal.SIGTERM, lambda *_: runner.stop())
        try:
            runner.run(Call("call", 60, "", ((writes("long", 1000, 0.02),), (writes("never", 1),))))
        except KeyboardInterrupt:
            os._exit(7)
        os._exit(0)
    deadline = time.monotonic() + 20
    while not (tmp_path / "out" / RESULTS).exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(child, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    out = tmp_path / "out"
    assert endings(out) == {"long": "cut"}
    assert not faults(out)
    with tarfile.open(out / "bundle.tar.gz") as bundle:
        assert {"long/results.jsonl", "long/log.txt"} <= set(bundle.getnames())


def test_a_half_written_line_is_skipped_and_then_read(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_text('{"a": 1}\n{"a": 2')
    mirror = Mirror(target)
    mirror.take(source)
    assert target.read_text() == '{"a": 1}\n'
    assert list(read(source)) == [{"a": 1}]
    with open(source, "a") as file:
        file.write("}\n")
    mirror.take(source)
    assert list(read(target)) == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("length", [1, 200])
def test_a_file_that_was_replaced_is_read_from_its_beginning(tmp_path: Path, length: int) -> None:
    """Also by a longer one in the same place on the disk, as a benchmark that starts anew leaves it."""
    source, target = tmp_path / "source", tmp_path / "target"
    mirror = Mirror(target)
    for run, lines in (("first", 5), ("second", length)):
        source.write_text("".join(json.dumps({"run": run, "number": n, "pad": "-" * n}) + "\n" for n in range(lines)))
        mirror.take(source)
    found = [(line["run"], line["number"]) for line in read(target)]
    assert found == [("first", n) for n in range(5)] + [("second", n) for n in range(length)]


def test_a_call_does_not_bring_home_the_rows_of_another(ran: Any, tmp_path: Path) -> None:
    ran((writes("one", 3),))
    _, out, _ = ran((writes("one", 1),))
    assert [row["n"] for row in read(out / RESULTS)] == [0, 1, 2, 0]


def test_files_that_are_not_whole_are_told(tmp_path: Path) -> None:
    append(tmp_path / RECORD, {"event": "started", "stage": "x"})
    (tmp_path / RESULTS).write_text('{"a": \n{"a": 2}\n')
    (tmp_path / "bundle.tar.gz").write_bytes(b"\x1f\x8b\x08\x00no archive")
    found = faults(tmp_path)
    assert any("results.jsonl: 1 of 2 lines cannot be read" in fault for fault in found)
    assert any(fault.startswith("bundle.tar.gz") for fault in found)


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_every_program_of_the_plan_takes_its_arguments(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [part.format(python="python", here="here", work="work", cache="cache") for part in stage.command]
    if arguments[0] == "sh":
        assert (ROOT / arguments[1]).is_file()
        return
    module, rest = arguments[2], arguments[3:]
    if module == "pytest":
        assert (ROOT / rest[0]).is_dir()
        assert "--require-gpu" in rest
    elif module == "bench.form":
        assert form.parsed(rest).backend in BACKENDS
        assert rest[rest.index("--device") + 1] == "cuda"
    elif module == "simmp_fast.kernels.tune":
        assert tune.main([*rest, "--dry-run"]) == 0
    else:
        assert rest[0] == "bench"
        assert rest[rest.index("--device") + 1] == "cuda"
        rest[rest.index("--device") + 1] = "cpu"
        assert simmp_fast([*rest, "--list", "--all"]) == 0
        assert capsys.readouterr().out


def test_without_a_gpu_a_call_fails_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["check", str(tmp_path / "out"), "--work", str(tmp_path / "work")]) == 2
    assert "no CUDA device is present" in capsys.readouterr().err
    assert [line["event"] for line in read(tmp_path / "out" / RECORD)] == ["device"]


def test_an_unknown_stage_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["check", str(tmp_path), "--only", "everything"]) == 2
    assert "stage: got 'everything', expected some of tests, sanitize-memcheck" in capsys.readouterr().err


def test_the_plan_is_told_and_fits_its_calls(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["plan"]) == 0
    text = capsys.readouterr().out
    assert all(stage.name in text for stage in STAGES)
    assert len({stage.name for stage in STAGES}) == len(STAGES)
    # A quarter of an hour, with the start and the end of the machine.
    assert sum(call.seconds for call in CALLS.values()) <= 820


def test_the_table_says_what_was_found(tmp_path: Path) -> None:
    append(tmp_path / RECORD, {"event": "device", "gpu": "a GPU", "capability": "9.0", "torch": "2", "triton": "3"})
    append(tmp_path / RECORD, {"event": "started", "call": "check", "stage": "tests"})
    for test, outcome in (("split_attention-dim_65", "failed"), ("context_attention-dim_96", "passed")):
        node = f"tests/gpu/test_x.py::test_parity[{test}-torch.float32]"
        append(tmp_path / TESTS, {"test": node, "outcome": "started"})
        append(tmp_path / TESTS, {"test": node, "outcome": outcome})
    append(tmp_path / TESTS, {"test": "tests/gpu/test_x.py::test_graph", "outcome": "started"})
    row = {"operator": "training_step", "backend": "triton", "dtype": "bfloat16", "status": "ok", "message": ""}
    row["shape"] = {"B": 20}
    append(tmp_path / RESULTS, {**row, "median_ms": 84.0, "parity": "not checked"})
    whole = {**row, "median_ms": 84.0, "rate": 238.1, "peak_bytes": 9.1 * 2**30, "parity": "passed"}
    append(tmp_path / RESULTS, whole)
    append(tmp_path / RESULTS, {**row, "operator": "split_attention", "parity": "failed", "message": "too far"})
    kernels = [
        {"name": "attention_forward", "blocks": 500, "calls": 9, "ms": 9.4},
        {"name": "gemm", "calls": 3, "ms": 2.0},
    ]
    stages = tmp_path / "stages" / "step-triton-bfloat16"
    stages.mkdir(parents=True)
    (stages / "profile-triton-bfloat16.json").write_text(json.dumps({"kernels": kernels}))
    text = table.summary(tmp_path, tmp_path / "stages")
    for line in (
        "| check | tests | no end |  |  |",
        "| split_attention | 0 | 1 | 0 | 0 |",
        "| context_attention | 1 | 0 | 0 | 0 |",
        "| test_x: test_graph | 0 | 0 | 0 | 1 |",
        "| split_attention | triton | bfloat16 | B=20 | parity failed: too far |",
        "| triton | bfloat16 | 84.00 | 238 | 9.10 |  | parity passed |",
        "| peak GiB, triton bfloat16 | 4.55 | 9.10 | 2.00 |",
        "| `attention_forward` | 500 | 9 | 9.400 |",
        "| step, triton | 42 | 84.00 | 2.00 |",
        "| attention, triton | 4.7 | 9.40 | 2.00 |",
    ):
        assert line in text


def test_the_record_is_appended_by_one_write(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    children = []
    for worker in range(4):
        child = os.fork()
        if child == 0:
            for number in range(200):
                append(path, {"worker": worker, "number": number, "pad": "-" * 300})
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    assert sum(1 for _ in read(path)) == 800
