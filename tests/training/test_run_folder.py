from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys

import pytest
from training_stubs import ROOT, tiny_config

from simmp_fast.config import Config, ConfigError, from_mapping, read_yaml
from simmp_fast.training.errors import TrainingError
from simmp_fast.training.log import RunLog
from simmp_fast.training.run_folder import RunFolder

DATA = {"data.json": {"name": "shapes", "classes": ["background", "disc"]}}
HOLD = """
import sys, time
from simmp_fast.training.run_folder import FolderLock
from pathlib import Path
lock = FolderLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def holder(folder) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def with_train(config: Config, **changes) -> Config:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **changes))


def begin(path, config: Config, *, resume: bool = False) -> None:
    with RunFolder(path, config, DATA, resume=resume) as folder:
        folder.record()


def test_a_new_folder_records_the_run(tmp_path):
    config = tiny_config()
    with RunFolder(tmp_path / "a" / "run", config, DATA) as folder:
        folder.record()
        assert from_mapping(Config, read_yaml(folder.path / "config.yaml")) == config
        assert json.loads((folder.path / "data.json").read_text()) == DATA["data.json"]
        environment = json.loads((folder.path / "environment.json").read_text())
    assert environment["versions"]["torch"]
    assert environment["python"]
    assert environment["platform"]


def test_an_existing_run_is_not_overwritten(tmp_path):
    begin(tmp_path / "run", tiny_config())
    with pytest.raises(ConfigError, match=r"run: run folder exists; resume it"):
        RunFolder(tmp_path / "run", tiny_config(), DATA)
    begin(tmp_path / "run", tiny_config(), resume=True)


def test_nothing_to_resume(tmp_path):
    with pytest.raises(ConfigError, match="no run to resume"):
        RunFolder(tmp_path / "typo", tiny_config(), DATA, resume=True)
    assert not (tmp_path / "typo").exists()


def test_an_empty_folder_is_as_good_as_none(tmp_path):
    begin(tmp_path, tiny_config())


def test_killed_before_anything_was_recorded(tmp_path):
    (tmp_path / "run.lock").write_text("pid 1 on elsewhere")
    (tmp_path / ".0123456789ab-config.yaml").write_text("mod")
    (tmp_path / "data.json").write_text("{}")
    with pytest.raises(ConfigError, match="no run to resume"):
        RunFolder(tmp_path, tiny_config(), DATA, resume=True)
    begin(tmp_path, tiny_config())
    assert not (tmp_path / ".0123456789ab-config.yaml").exists()


def test_a_folder_of_other_things_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    for resume in (False, True):
        with pytest.raises(ConfigError):
            RunFolder(tmp_path, tiny_config(), DATA, resume=resume)
    assert {path.name for path in tmp_path.iterdir()} == {"thesis.txt"}


def test_a_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(ConfigError, match="got a file, expected a folder"):
        RunFolder(tmp_path / "run", tiny_config(), DATA)


def test_resume_lists_the_settings_that_differ(tmp_path):
    begin(tmp_path, tiny_config())
    with pytest.raises(ConfigError, match=r"train\.lr is 0\.5, saved as 0\.001; train\.seed is 1, saved as 2222"):
        RunFolder(tmp_path, with_train(tiny_config(), lr=0.5, seed=1), DATA, resume=True)
    begin(tmp_path, tiny_config(), resume=True)  # the failed attempt left the lock free


def test_resume_may_change_what_does_no_harm(tmp_path):
    begin(tmp_path, tiny_config())
    longer = with_train(tiny_config(), epochs=9, workers=2, log_every=7)
    begin(tmp_path, longer, resume=True)
    assert read_yaml(tmp_path / "config.yaml")["train"]["epochs"] == 9
    with pytest.raises(ConfigError, match=r"train\.epochs: got 3, expected at least 9"):
        RunFolder(tmp_path, tiny_config(), DATA, resume=True)


def test_resume_refuses_other_data(tmp_path):
    begin(tmp_path, tiny_config())
    other = {"data.json": {"name": "others", "classes": ["background", "disc"]}}
    with pytest.raises(ConfigError, match=r"other data, which differ in name \(data\.json\)"):
        RunFolder(tmp_path, tiny_config(), other, resume=True)


def test_a_folder_in_use_names_folder_and_process(tmp_path):
    process = holder(tmp_path)
    try:
        with pytest.raises(ConfigError, match=rf"{tmp_path}: run folder in use by pid {process.pid} on"):
            RunFolder(tmp_path, tiny_config(), DATA)
    finally:
        process.kill()
        process.wait()


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path):
    process = holder(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert f"pid {process.pid}" in (tmp_path / "run.lock").read_text()
    with RunFolder(tmp_path, tiny_config(), DATA):
        assert f"pid {os.getpid()} " in (tmp_path / "run.lock").read_text()


def test_the_same_process_cannot_use_a_folder_twice(tmp_path):
    message = rf"this process \(pid {os.getpid()}\) is already training there"
    with RunFolder(tmp_path, tiny_config(), DATA), pytest.raises(ConfigError, match=message):
        RunFolder(tmp_path, tiny_config(), DATA)


def test_temporary_files_of_a_killed_run_are_removed(tmp_path):
    begin(tmp_path, tiny_config())
    leftover = tmp_path / ".0123456789ab-last.state.pt"
    leftover.write_text("half")
    begin(tmp_path, tiny_config(), resume=True)
    assert not leftover.exists()


def test_a_lock_or_log_that_cannot_be_written(tmp_path):
    (tmp_path / "a" / "run.lock").mkdir(parents=True)
    with pytest.raises(ConfigError, match=rf"{tmp_path}/a/run.lock: cannot be written \(Is a directory\)"):
        RunFolder(tmp_path / "a", tiny_config(), DATA)
    for name in ("metrics.jsonl", "train.log"):
        (tmp_path / name / name).mkdir(parents=True)
        with pytest.raises(TrainingError, match=rf"{tmp_path}/{name}/{name}: cannot be written \(Is a directory\)"):
            RunLog(tmp_path / name, total_steps=1)


def test_a_file_above_the_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=rf"{tmp_path}/file/run: cannot be used as a run folder \("):
        RunFolder(tmp_path / "file" / "run", tiny_config(), DATA)


def test_records_with_a_key_twice_are_not_compared(tmp_path):
    begin(tmp_path, tiny_config())
    (tmp_path / "data.json").write_text('{"name": "others",\n "name": "shapes", "classes": ["background", "disc"]}')
    with pytest.raises(ConfigError, match=r"data.json: cannot be read as JSON: name: got this key twice, see line"):
        RunFolder(tmp_path, tiny_config(), DATA, resume=True)


def test_the_log_takes_names_that_are_not_utf8(tmp_path, capsys):
    with RunLog(tmp_path, total_steps=1) as log:
        log.say("caf\udce9: saved")
    assert (tmp_path / "train.log").read_text(encoding="utf-8").endswith(" caf\\xe9: saved\n")
    assert capsys.readouterr().err == "caf\\xe9: saved\n"


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
from simmp_fast.training.run_folder import FolderLock
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
