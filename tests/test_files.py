import errno
import hashlib
import os
import signal
import socket
import subprocess
import sys

import pytest

from simmp_fast import files
from simmp_fast.data.errors import DataError


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


def test_atomic_folder_leaves_nothing_of_a_failure(tmp_path, names):
    with pytest.raises(RuntimeError), files.atomic_folder(tmp_path / "deep" / "er" / "out") as temporary:
        half_write(temporary / "half", RuntimeError)
    assert names(tmp_path) == []


def test_atomic_folder_keeps_the_old_one_until_the_new_one_is_complete(tmp_path, names, monkeypatch):
    out = tmp_path / "out"
    with files.atomic_folder(out) as temporary:
        (temporary / "old").write_text("x")
    rename = os.rename

    def refuses_the_new(source, target):
        if str(target) == str(out) and not (source / "old").exists():
            raise OSError(errno.EIO, "input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuses_the_new)
    with pytest.raises(OSError, match="input/output"), files.atomic_folder(out) as temporary:
        (temporary / "new").write_text("x")
    assert names(tmp_path) == ["out"]
    assert names(out) == ["old"]
    monkeypatch.undo()
    with files.atomic_folder(out) as temporary:
        (temporary / "new").write_text("x")
    assert names(tmp_path) == ["out"]
    assert names(out) == ["new"]


@pytest.mark.parametrize(("code", "message"), [(errno.ENOSPC, "the disk is full"), (errno.EACCES, "cannot be written")])
def test_disk_errors_name_the_path(tmp_path, code, message):
    with pytest.raises(DataError, match=f"out.*{message}"), files.disk_errors(tmp_path / "out"):
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
    with files.atomic_folder(tmp_path / name.replace("t", "f")):
        pass
    assert names(tmp_path) == sorted([name, name.replace("t", "f")])


def ended_process():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_atomic_folder_removes_what_a_dead_process_left_of_the_same_folder(tmp_path, names):
    host, dead, part = socket.gethostname(), ended_process(), "0123456789ab"
    (tmp_path / f".simmp-fast-{host}-{dead}-{part}-out").mkdir()
    (tmp_path / f".simmp-fast-{host}-{dead}-{part}-out" / "half").touch()
    kept = [
        f".simmp-fast-{host}-{os.getpid()}-{part}-out",
        f".simmp-fast-{host}-1-{part}-out",
        f".simmp-fast-{host}-{dead}-{part}-other",
        f".simmp-fast-{host}-{dead}-{part}-out.nii.gz",
        f".simmp-fast-{host}-{dead}-0123-out",
        f".simmp-fast-{host}2-{dead}-{part}-out",
        f".{part}-out",
        f"simmp-fast-{host}-{dead}-{part}-out",
    ]
    for name in kept:
        (tmp_path / name).mkdir()
    (tmp_path / f".simmp-fast-{host}-{dead}-{part[::-1].replace('b', 'c')}-out").symlink_to(tmp_path / kept[0])
    before = names(tmp_path)
    with files.atomic_folder(tmp_path / "out") as temporary:
        (temporary / "new").touch()
    before.remove(f".simmp-fast-{host}-{dead}-{part}-out")
    assert names(tmp_path) == sorted([*before, "out"])


def test_a_killed_process_leaves_a_folder_that_the_next_removes(tmp_path, names):
    for _ in range(2):
        process = os.fork()
        if process == 0:
            with files.atomic_folder(tmp_path / "out") as temporary:
                (temporary / "half").touch()
                os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(process, 0)
        assert len(names(tmp_path)) == 1
    with files.atomic_folder(tmp_path / "out"):
        pass
    assert names(tmp_path) == ["out"]


def test_atomic_folder_follows_a_link(tmp_path, names):
    (tmp_path / "disk" / "big").mkdir(parents=True)
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "big")
    with files.atomic_folder(tmp_path / "out") as temporary:
        (temporary / "new").touch()
    assert names(tmp_path) == ["disk", "out"]
    assert names(tmp_path / "disk") == ["big"]
    assert names(tmp_path / "out") == ["new"]


@pytest.mark.parametrize(("system", "flag"), [("posix", os.O_RDONLY), ("nt", os.O_RDWR)])
def test_windows_syncs_files_that_are_open_for_writing_alone(tmp_path, monkeypatch, system, flag):
    path, opened, real = tmp_path / "a", [], os.open
    path.touch()
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", lambda path, flags: opened.append(flags) or real(path, flags))
        patch.setattr(os, "name", system)
        files._sync(path)
        files._sync(tmp_path)
    assert opened == ([flag] if system == "nt" else [flag, flag])
