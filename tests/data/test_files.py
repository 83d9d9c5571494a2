import errno
import hashlib
import os

import pytest

from simmp_fast.data import files
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
