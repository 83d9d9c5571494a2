"""Signals to a whole process group, closed terminals and stuck loading processes: the run is saved all the same."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import processes
import pytest
from training_stubs import ROOT, assert_equal_runs, start_child, tiny_config, wait_for

from simmp_fast.config import Config, to_mapping
from simmp_fast.data.cache import Cache
from simmp_fast.training.checkpoint import load_last
from simmp_fast.training.interrupt import StopRequest

# A command line that trains the stub, slowly, or in other ways that a test asks for.
COMMAND = """
import os, sys, time
sys.path[:0] = {path!r}
import torch
from training_stubs import TinyModel
from simmp_fast import cli
from simmp_fast.data import loader
from simmp_fast.training import loop
torch.set_num_threads(1)
loop.SimMPNet, plain = TinyModel, loop.TrainStep.__call__
def slow(self, *arguments, **keywords):
    time.sleep({pause})
    return plain(self, *arguments, **keywords)
loop.TrainStep.__call__ = slow
{more}
sys.exit(cli.main(sys.argv[1:]))
"""
STUCK = """
read, calls = loader.augment_sample, []
def stick(*arguments):
    calls.append(1)
    if len(calls) > 3:
        open({mark!r}, "w").close()
        time.sleep(600)
    return read(*arguments)
loader.augment_sample = stick
"""


class Child:
    """`simmp-fast train` in a session of its own."""

    def __init__(self, cache: Cache, folder: Path, config: Config, *, ranks: int = 1, more: str = "", **streams: Any):
        self.run, script = folder / "run", folder / "command.py"
        path = [str(ROOT), str(ROOT / "tests" / "training")]
        script.write_text(COMMAND.format(path=path, pause=0.1, more=more))
        (folder / "config.json").write_text(json.dumps(to_mapping(config)))
        launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
        launch += ["--master-port", str(processes.free_port())]
        command = ["train", "--data", cache.folder, "--run-folder", self.run, "--device", "cpu"]
        command += ["--config", folder / "config.json"]
        self.process = subprocess.Popen(
            [sys.executable, *(launch if ranks > 1 else []), script, *map(str, command)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            text=True,
            start_new_session=True,
            **{"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, **streams},
        )

    def steps(self, count: int) -> None:
        """Wait until that many rows of metrics are written."""
        metrics = self.run / "metrics.jsonl"
        wait_for(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= count, self.process, 120)

    def signal_all(self, *numbers: int) -> None:
        """Send signals to the whole group, as a terminal or a batch system does."""
        for number in numbers:
            os.killpg(self.process.pid, number)

    def end(self) -> tuple[int, str]:
        """Exit status and what was said on standard error; nothing of the group is left."""
        try:
            said = self.process.communicate(timeout=60)[1] or ""
            with pytest.raises(ProcessLookupError):
                os.killpg(self.process.pid, 0)
            return self.process.returncode, said
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)


def assert_saved(run: Path) -> int:
    """The step of the checkpoint that the log says was saved."""
    loaded = load_last(run)
    assert loaded is not None
    assert f"interrupted at step {loaded[2].step}, epoch" in (run / "train.log").read_text()
    return loaded[2].step


def slow_config(**train: Any) -> Config:
    return tiny_config(**{"epochs": 40, "log_every": 1, "validate_every": 100, **train})


def test_a_whole_group_is_told_to_end(cache: Cache, tmp_path: Path) -> None:
    """By systemd, say, which sends SIGTERM and then SIGHUP."""
    child = Child(cache, tmp_path, slow_config(workers=2))
    child.steps(3)
    child.signal_all(signal.SIGTERM, signal.SIGHUP, signal.SIGTERM)
    status, said = child.end()
    assert (status, "Traceback" in said) == (130, False), said
    assert assert_saved(child.run) >= 3


def test_a_group_of_torchrun_is_told_to_end(cache: Cache, tmp_path: Path) -> None:
    """Each process gets the signal twice: from the group, and from torchrun."""
    child = Child(cache, tmp_path, slow_config(workers=1), ranks=2)
    child.steps(3)
    child.signal_all(signal.SIGTERM)
    _, said = child.end()
    assert "interrupted at step" in said, said
    assert assert_saved(child.run) >= 3


def test_a_stuck_loading_process_does_not_keep_a_run_from_saving(cache: Cache, tmp_path: Path) -> None:
    mark = tmp_path / "stuck"
    child = Child(cache, tmp_path, slow_config(workers=2), more=STUCK.format(mark=str(mark)))
    wait_for(mark.exists, child.process, 120)
    child.steps(2)  # all that the two processes gave
    child.signal_all(signal.SIGTERM)
    status, said = child.end()
    assert (status, "Traceback" in said) == (130, False), said
    assert assert_saved(child.run) == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_output_that_is_not_taken_ends_no_run(cache: Cache, tmp_path: Path) -> None:
    """A full disk behind the command line's messages, and a pipe that nobody reads behind those of Python's `train`."""
    with open("/dev/full", "w") as full:
        child = Child(cache, tmp_path, slow_config(epochs=1), stderr=full)
    script = start_child(cache.folder, tmp_path / "plain", slow_config(epochs=1), stub=True)
    assert script.stderr is not None
    script.stderr.close()
    assert child.process.wait(120) == 0
    assert script.wait(120) == 0
    assert_equal_runs(child.run, tmp_path / "plain")


@pytest.mark.parametrize("ignored", [False, True], ids=["saved", "nohup"])
def test_a_terminal_that_is_closed(cache: Cache, tmp_path: Path, ignored: bool) -> None:
    ours, theirs = pty.openpty()
    config = slow_config(epochs=2 if ignored else 40, workers=1)
    line = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)" if ignored else ""
    child = Child(cache, tmp_path, config, more=line, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    child.steps(3)
    os.close(ours)  # all that is written to it is an error now
    child.signal_all(signal.SIGHUP)
    assert child.end()[0] == (0 if ignored else 130)
    if ignored:
        assert load_last(child.run)[2].epoch == 2
    else:
        assert assert_saved(child.run) >= 3


@pytest.fixture
def handled() -> Any:
    """SIGINT, SIGTERM and SIGHUP as Python has them, whatever started the tests."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    for number in before:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("handled")
def test_only_a_second_interrupt_acts_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with StopRequest() as stop:
        for name in ("SIGTERM", "SIGHUP", "SIGTERM", "SIGINT"):
            signal.raise_signal(signal.Signals[name])
            assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    with StopRequest() as stop:
        for _ in range(3):
            signal.raise_signal(signal.SIGINT)
        assert stop.requested


@pytest.mark.usefixtures("handled")
def test_ignored_signals_stay_ignored_in_training() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
        with StopRequest() as stop:
            signal.raise_signal(number)
            assert not stop.requested
        assert signal.getsignal(number) is signal.SIG_IGN


@pytest.mark.usefixtures("handled")
def test_what_a_request_ends() -> None:
    with StopRequest() as stop:
        assert stop.unless_stopped(lambda: 3) == 3
        assert list(stop.each([1, 2])) == [1, 2]
        received = []
        for item in stop.each([1, 2, 3]):
            received.append(item)
            if item == 2:
                signal.raise_signal(signal.SIGTERM)
        assert received == [1, 2]
        assert stop.unless_stopped(lambda: 3) is None
    with StopRequest() as stop:
        assert stop.unless_stopped(lambda: signal.raise_signal(signal.SIGHUP) or 3) is None
        assert stop.requested

    def interrupted_twice() -> int:
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)  # disturbs no cleaning up
        signal.raise_signal(signal.SIGINT)
        return 3

    with StopRequest() as stop, pytest.raises(KeyboardInterrupt):
        stop.unless_stopped(interrupted_twice)
