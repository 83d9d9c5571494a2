import errno
import hashlib
import os
import socket
import subprocess
import sys

import pytest

from simmp_fast import files, folders
from simmp_fast.data.errors import DataError, disk_errors


@pytest.fixture
def names():
    """Every name in a folder, hidden ones too: to see that nothing is left behind."""
    return lambda folder: sorted(path.name for path in folder.iterdir())


def half_write(path, error):
    path.write_text("half")
    raise error


def test_atomic_file_replaces_only_when_the_block_ends_well(tmp_path, names):
    path = tmp_path / "new" / "a.nii.gz"
    with files.atomic_file(path) as temporary:
        assert temporary.name.endswith("a.nii.gz")
        assert not path.exists()
        temporary.write_text("first")
    assert path.read_text() == "first"
    with pytest.raises(KeyboardInterrupt), files.atomic_file(path) as temporary:
        half_write(temporary, KeyboardInterrupt)
    assert path.read_text() == "first"
    assert names(path.parent) == ["a.nii.gz"]


def test_a_missing_folder_is_made_or_refused(tmp_path, names):
    with pytest.raises(FileNotFoundError) as caught, files.atomic_file(tmp_path / "a" / "b", make_parents=False):
        pass
    assert caught.value.filename == str(tmp_path / "a")
    assert names(tmp_path) == []


def test_new_file_is_left_to_its_caller(tmp_path, names):
    with files.new_file(tmp_path / "a.bin") as temporary:
        temporary.write_text("whole")
    assert names(tmp_path) == [temporary.name]
    files.remove_leftovers(tmp_path)
    assert temporary.read_text() == "whole"
    with pytest.raises(KeyboardInterrupt), files.new_file(tmp_path / "b.bin") as other:
        half_write(other, KeyboardInterrupt)
    assert names(tmp_path) == [temporary.name]


@pytest.mark.parametrize(("code", "message"), [(errno.ENOSPC, "the disk is full"), (errno.EACCES, "cannot be written")])
def test_disk_errors_name_the_path(tmp_path, code, message):
    with pytest.raises(DataError, match=f"out.*{message}"), disk_errors(tmp_path / "out"):
        raise OSError(code, "reason")


def test_a_full_disk_on_sync_keeps_the_old_file(tmp_path, names, monkeypatch):
    path = tmp_path / "a.json"
    files.write_json(path, {"a": 1})

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        files.write_json(path, {"a": 2})
    assert '"a": 1' in path.read_text()
    assert names(tmp_path) == ["a.json"]


def test_hashing_writer_knows_size_and_checksum(tmp_path):
    with files.HashingWriter(tmp_path / "f") as writer:
        writer.write(b"abc")
        writer.write(b"def")
    assert writer.bytes == 6
    assert writer.sha256() == files.sha256(tmp_path / "f") == hashlib.sha256(b"abcdef").hexdigest()


def test_files_are_readable_as_the_umask_says(tmp_path):
    old = os.umask(0o022)
    try:
        files.write_json(tmp_path / "a.json", {})
    finally:
        os.umask(old)
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("name", ["x" * 251 + ".txt", "\u00e9" * 125 + ".txt"])
def test_names_may_be_as_long_as_the_system_allows(tmp_path, names, name):
    with files.atomic_file(tmp_path / name) as temporary:
        assert temporary.suffix == ".txt"
        temporary.touch()
    with folder(tmp_path / name.replace("t", "f")):
        pass
    assert names(tmp_path) == sorted([name, name.replace("t", "f")])


@pytest.mark.parametrize("name", ["x" * 252 + ".txt", "\u00e9" * 126 + ".txt"])
def test_names_that_are_too_long_are_an_error(tmp_path, names, name):
    with pytest.raises(OSError, match="too long"), files.atomic_file(tmp_path / name) as temporary:
        temporary.touch()
    assert names(tmp_path) == []


def folder(path):
    return folders.atomic_folder(path, replace=False, last="last")


def ended_process():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_leftovers_of_dead_processes_are_removed_and_nothing_else(tmp_path, names):
    host, dead, part = socket.gethostname(), ended_process(), "0123456789ab"
    with files.new_file(tmp_path / "mine") as mine:
        mine.touch()
    kept = [
        f".simmp-fast-{host}-1-{part}-out",
        f".simmp-fast-{host}-{dead}-0123-out",
        f".simmp-fast-{host}2-{dead}-{part}-out",
        f".simmp-fast-{host}-{dead}-{part}-",
        f".{part}-out",
        f"simmp-fast-{host}-{dead}-{part}-out",
        ".simmp-fast-ready",
    ]
    for name in kept:
        (tmp_path / name).mkdir()
    link = f".simmp-fast-{host}-{dead}-{part}-link"
    (tmp_path / link).symlink_to(tmp_path / kept[0])
    for process in (dead, os.getpid()):  # in a container every start has the same number
        (tmp_path / f".simmp-fast-{host}-{process}-{part}-out").mkdir()
        (tmp_path / f".simmp-fast-{host}-{process}-{part}-out" / "half").touch()
        (tmp_path / f".simmp-fast-{host}-{process}-{part}-a\nb.nii.gz").touch()
    unread = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, unread.pid, os.WEXITED | os.WNOWAIT)
    (tmp_path / f".simmp-fast-{host}-{unread.pid}-{part}-out").touch()
    files.remove_leftovers(tmp_path)
    unread.wait()
    assert names(tmp_path) == sorted([*kept, link, mine.name])
    files.remove_leftovers(tmp_path / "nowhere")


@pytest.mark.parametrize(("system", "flag"), [("posix", os.O_RDONLY), ("nt", os.O_RDWR)])
def test_windows_syncs_files_that_are_open_for_writing_alone(tmp_path, monkeypatch, system, flag):
    path, opened, real = tmp_path / "a", [], os.open
    path.touch()
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", lambda path, flags: opened.append(flags) or real(path, flags))
        patch.setattr(os, "name", system)
        files.sync(path)
        files.sync(tmp_path)
    assert opened == ([flag] if system == "nt" else [flag, flag])
