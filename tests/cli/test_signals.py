"""A signal ends a command as an interrupt does: nothing temporary is left, and the exit status names the signal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from simmp_fast import cli

ROOT = Path(__file__).resolve().parents[2]
# Prepare that waits while it writes its first case.
SLOW = """
import sys, time
from simmp_fast.cli import main
from simmp_fast.data.cache import CacheWriter
def add(self, *arguments):
    print("writing", flush=True)
    time.sleep(60)
CacheWriter.add = add
sys.exit(main(sys.argv[1:]))
"""


def test_prepare_that_is_terminated_leaves_nothing(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    for i in range(4):
        Image.fromarray(rng.integers(0, 255, (8, 8), dtype=np.uint8)).save(tmp_path / "images" / f"{i}.png")
        Image.fromarray(np.eye(8, dtype=np.uint8)).save(tmp_path / "masks" / f"{i}.png")
    (tmp_path / "set.yaml").write_text(yaml.safe_dump({"name": "set", "classes": ["no", "yes"]}))
    before = sorted(tmp_path.iterdir())
    command = ["prepare", tmp_path / "set.yaml", "--out", tmp_path / "made" / "cache", "--image-size", "64"]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors
    assert errors.splitlines()[-1] == "terminated"
    assert "Traceback" not in errors
    assert sorted(tmp_path.iterdir()) == before


class Command:
    """A command that gets a signal at work, in place of `info`."""

    def __init__(self, number: signal.Signals) -> None:
        self.number, self.cleaned = number, False

    def __call__(self, arguments: object) -> int:
        try:
            os.kill(os.getpid(), self.number)
            return 0
        finally:
            self.ignored = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is signal.SIG_IGN]
            os.kill(os.getpid(), self.number)  # a second one does not disturb the cleaning up
            self.cleaned = True


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_signals_raise_in_the_main_thread(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    number = signal.Signals[name]
    command = Command(number)
    monkeypatch.setattr(cli.info, "run", command)
    before = {each: signal.signal(each, signal.SIG_DFL) for each in (signal.SIGTERM, signal.SIGHUP)}
    try:
        assert cli.main(["info"]) == 128 + number
        assert command.cleaned
        assert command.ignored == [signal.SIGTERM, signal.SIGHUP], "nor does one of the other kind"
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    assert capsys.readouterr().err == "terminated\n"


def test_ignored_signals_stay_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.info, "run", Command(signal.SIGHUP))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert cli.main(["info"]) == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_other_threads_run_commands_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.info, "run", lambda arguments: 0)
    results: list[int] = []
    thread = threading.Thread(target=lambda: results.append(cli.main(["info"])))
    thread.start()
    thread.join()
    assert results == [0]
