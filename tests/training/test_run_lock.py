"""One process at a time trains in a folder."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys

import pytest
from test_run_folder import DATA
from training_stubs import ROOT, tiny_config

from simmp_fast.config import ConfigError
from simmp_fast.training import lock
from simmp_fast.training.lock import FolderLock
from simmp_fast.training.run_folder import RunFolder

# With a child that outlives it, as data loading processes outlive a killed trainer by seconds.
HOLD = """
import os, sys, time
from simmp_fast.training.lock import FolderLock
from pathlib import Path
lock = FolderLock(Path(sys.argv[1]))
if os.fork() == 0:
    print("held", flush=True)
time.sleep(60)
"""


def holder(folder) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_folder_in_use(tmp_path):
    run, moved = tmp_path / "run", tmp_path / "moved"
    run.mkdir()
    process = holder(run)
    try:
        with pytest.raises(ConfigError, match=rf"{run}: run folder in use by pid {process.pid} on"):
            RunFolder(run, tiny_config(), DATA)
        run.rename(moved)
        with pytest.raises(ConfigError, match=rf"{moved}: run folder in use by pid {process.pid} on"):
            RunFolder(moved, tiny_config(), DATA)
        (moved / "run.lock").unlink()
        with pytest.raises(ConfigError, match=r"moved: run folder in use by another process"):
            RunFolder(moved, tiny_config(), DATA)
        process.send_signal(signal.SIGKILL)  # its child lives on
        process.wait()
        with RunFolder(moved, tiny_config(), DATA):
            assert f"pid {os.getpid()} " in (moved / "run.lock").read_text()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_the_name_of_a_dead_process_is_replaced(tmp_path):
    (tmp_path / "run.lock").write_text("pid 1 on elsewhere\n")
    held = FolderLock(tmp_path)
    assert (tmp_path / "run.lock").read_text().startswith(f"pid {os.getpid()} on ")
    held.release()
    assert (tmp_path / "run.lock").read_text() == ""


@pytest.mark.parametrize("code", [9, 95], ids=["EBADF", "EOPNOTSUPP"])
def test_a_file_system_that_does_not_lock_folders(tmp_path, monkeypatch, code):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    held = FolderLock(tmp_path)
    child = os.fork()
    if child == 0:
        lock._held.clear()
        try:
            FolderLock(tmp_path)
        except ConfigError as error:
            os._exit(7 if f"in use by pid {os.getppid()} on" in str(error) else 8)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    held.release()
    FolderLock(tmp_path).release()


def test_the_same_process_cannot_use_a_folder_twice(tmp_path):
    message = rf"this process \(pid {os.getpid()}\) is already training there"
    with RunFolder(tmp_path, tiny_config(), DATA), pytest.raises(ConfigError, match=message):
        RunFolder(tmp_path, tiny_config(), DATA)


# Windows has no fcntl; a module with its one function takes the place of msvcrt here.
WITHOUT_FCNTL = """
import os, sys, types
sys.modules["fcntl"] = None
msvcrt, calls = types.ModuleType("msvcrt"), []
msvcrt.LK_NBLCK, msvcrt.LK_UNLCK = 2, 0
def locking(handle, mode, size):
    calls.append((mode, os.lseek(handle, 0, os.SEEK_CUR), size))
    if taken and mode == msvcrt.LK_NBLCK:
        raise PermissionError(13, "Permission denied")
msvcrt.locking, taken = locking, False
from pathlib import Path
from simmp_fast.cli import info, main
from simmp_fast.config import ConfigError
from simmp_fast.training.lock import FolderLock
try:
    main(["train", "--help"])
except SystemExit as stopped:
    assert stopped.code == 0
info.multiply_adds = lambda model: 0  # counting takes seconds
assert main(["info", "--preset", "small"]) == 0
folder = Path(sys.argv[1])
sys.modules["msvcrt"] = msvcrt  # so late, as the standard library takes it for the sign of Windows
FolderLock(folder).release()
FolderLock(folder).release()
assert calls == [(2, 2**30, 1), (0, 2**30, 1)] * 2, calls
(folder / "run.lock").write_text("pid 7 on elsewhere")
taken = True
try:
    FolderLock(folder)
except ConfigError as error:
    assert "run folder in use by pid 7 on elsewhere" in str(error)
else:
    raise AssertionError("the lock was taken twice")
"""


def test_windows_locks_without_fcntl(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", WITHOUT_FCNTL, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("linked", [False, True])
def test_a_file_that_is_no_lock_is_not_emptied(tmp_path, linked):
    (tmp_path / "notes").write_text("mine")
    (tmp_path / "run").mkdir()
    place = tmp_path / "run" / "run.lock"
    if linked:
        place.symlink_to(tmp_path / "notes")
    else:
        (tmp_path / "notes").rename(place)
    with pytest.raises(ConfigError, match="got a file that is no lock of a run, expected one or none"):
        FolderLock(tmp_path / "run")
    assert place.read_text() == "mine"
