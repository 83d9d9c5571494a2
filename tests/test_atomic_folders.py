"""Folders that appear whole or not at all: new ones, empty ones that stay themselves, and ones that are replaced."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from simmp_fast import folders
from simmp_fast.data.errors import DataError, disk_errors
from simmp_fast.folders import READY, atomic_folder, finish_folder

ROOT = Path(__file__).resolve().parents[1]


def fill(path: Path, text: str, replace: bool = False, before_the_end: Callable[[], object] = lambda: None) -> None:
    """Two files of one text; `last` makes the folder whole."""
    with atomic_folder(path, replace=replace, last="last") as temporary:
        for name in ("data", "last"):
            (temporary / name).write_text(text)
        before_the_end()


def texts(path: Path) -> dict[str, str]:
    return {str(p.relative_to(path)): p.read_text() for p in sorted(path.rglob("*")) if p.is_file()}


def whole(text: str) -> dict[str, str]:
    return {"data": text, "last": text}


def names(path: Path) -> list[str]:
    return sorted(os.listdir(path))


def refused(*_: object) -> None:
    raise OSError(errno.EINVAL, "Invalid argument")


@pytest.fixture
def in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system that cannot exchange two names."""
    monkeypatch.setattr(folders, "_exchange", refused)


def test_a_new_folder_and_its_parents(tmp_path: Path) -> None:
    def fails() -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        fill(tmp_path / "deep" / "er" / "out", "x", before_the_end=fails)
    assert names(tmp_path) == []
    fill(tmp_path / "deep" / "er" / "out", "x")
    assert texts(tmp_path / "deep" / "er" / "out") == whole("x")
    assert names(tmp_path / "deep" / "er") == ["out"]


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("there", ["missing", "empty"])
def test_what_is_put_there_meanwhile_is_kept(tmp_path: Path, there: str, replace: bool) -> None:
    out = tmp_path / "out"
    if there == "empty":
        out.mkdir()

    def put() -> None:
        out.mkdir(exist_ok=True)
        (out / "precious").write_text("p")

    with pytest.raises(FileExistsError, match="put there meanwhile") as caught:
        fill(out, "x", replace, before_the_end=put)
    assert caught.value.filename == str(out)
    assert texts(out) == {"precious": "p"}
    assert names(tmp_path) == ["out"]


def test_a_file_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("p")
    with pytest.raises(FileExistsError, match="put there meanwhile"):
        fill(tmp_path / "out", "x")
    assert texts(tmp_path) == {"out": "p"}


@pytest.mark.parametrize("link", [False, True])
def test_an_empty_folder_stays_itself(tmp_path: Path, link: bool) -> None:
    """A mounted volume cannot be renamed, nor can its parent always be written."""
    (tmp_path / "disk").mkdir()
    out = tmp_path / "disk"
    if link:
        out = tmp_path / "out"
        out.symlink_to(tmp_path / "disk")
    before, parent = os.stat(tmp_path / "disk").st_ino, os.stat(tmp_path).st_mtime_ns
    fill(out, "x")
    assert os.stat(tmp_path / "disk").st_ino == before
    assert os.stat(tmp_path).st_mtime_ns == parent
    assert texts(tmp_path / "disk") == whole("x")
    assert names(tmp_path / "disk") == ["data", "last"]


def test_a_link_to_nothing_gets_its_folder(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "big")
    fill(tmp_path / "out", "x")
    assert names(tmp_path) == ["disk", "out"]
    assert texts(tmp_path / "disk" / "big") == whole("x")


def test_replacing_exchanges_the_folders_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    fill(out, "old")
    seen = []
    exchange = folders._exchange

    def watched(first: Path, second: Path) -> None:
        seen.append(texts(second))
        exchange(first, second)
        seen.append(texts(second))

    monkeypatch.setattr(folders, "_exchange", watched)
    fill(out, "new", replace=True)
    if sys.platform == "linux":
        assert seen == [whole("old"), whole("new")]
    assert texts(out) == whole("new")
    assert names(tmp_path) == ["out"]
    with pytest.raises(FileExistsError, match="data, last was put there"):
        fill(out, "newer")
    assert texts(out) == whole("new")


@pytest.mark.usefixtures("in_place")
def test_replacing_in_place_takes_the_last_file_away_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    fill(out, "old")
    inode, moved, replace = os.stat(out).st_ino, [], os.replace

    def watched(source: Path, target: Path) -> None:
        moved.append({name: text for name, text in texts(out).items() if "/" not in name})
        replace(source, target)

    monkeypatch.setattr(os, "replace", watched)
    fill(out, "new", replace=True)
    assert moved == [{"data": "old"}, {"data": "new"}]
    assert texts(out) == whole("new")
    assert (names(tmp_path), names(out)) == (["out"], ["data", "last"])
    assert os.stat(out).st_ino == inode


@pytest.mark.parametrize("exchange", [True, False])
def test_foreign_files_are_never_replaced(tmp_path: Path, exchange: bool, request: pytest.FixtureRequest) -> None:
    if not exchange:
        request.getfixturevalue("in_place")
    out = tmp_path / "out"
    fill(out, "old")

    def put() -> None:
        (out / "notes").write_text("n")

    with pytest.raises(FileExistsError, match="notes was put there meanwhile"):
        fill(out, "new", replace=True, before_the_end=put)
    assert texts(out) == {**whole("old"), "notes": "n"}
    assert names(tmp_path) == ["out"]


def test_foreign_files_that_come_as_the_folders_change_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    fill(out, "old")
    exchange = folders._exchange

    def slow(first: Path, second: Path) -> None:
        (out / "notes").write_text("n") if texts(out) == whole("old") else None
        exchange(first, second)

    monkeypatch.setattr(folders, "_exchange", slow)
    with pytest.raises(FileExistsError, match="notes was put there meanwhile"):
        fill(out, "new", replace=True)
    assert texts(out) == {**whole("old"), "notes": "n"}
    assert names(tmp_path) == ["out"]


def test_a_parent_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the folder is a mounted volume: nothing can be moved in or out."""
    out, rename = tmp_path / "out", os.rename
    fill(out, "old")

    def rename_inside(source: Path, target: Path) -> None:
        if out not in Path(source).parents or out not in Path(target).parents:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        rename(source, target)

    monkeypatch.setattr(os, "rename", rename_inside)
    fill(out, "new", replace=True)
    assert texts(out) == whole("new")
    assert (names(tmp_path), names(out)) == (["out"], ["data", "last"])


@pytest.mark.parametrize("there", ["empty", "old"])
@pytest.mark.usefixtures("in_place")
def test_an_error_as_files_move_in_is_completed_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: str
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    if there == "old":
        fill(out, "old")

    def broken(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    message = "out: cannot be written .Input/output error.; all was written; run it again"
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", broken)
        with pytest.raises(DataError, match=message), disk_errors(out):
            fill(out, "new", replace=True)
    assert "last" not in names(out)
    finish_folder(out, "last")
    assert (texts(out), names(out)) == (whole("new"), ["data", "last"])


KILLED = """
import os, signal, sys
from simmp_fast import folders
real = {name: getattr(os, name) for name in ("rename", "replace", "unlink", "rmdir")}
count = iter(range(int(sys.argv[2])))
def counted(name):
    def call(*a, **k):
        if next(count, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return real[name](*a, **k)
    return call
for name in real:
    setattr(os, name, counted(name))
if sys.argv[3] == "in place":
    def refused(*a):
        raise OSError(22, "Invalid argument")
    folders._exchange = refused
with folders.atomic_folder(sys.argv[1], replace=True, last="last") as temporary:
    for name in ("data", "last"):
        (temporary / name).write_text("new")
"""


@pytest.mark.skipif(os.name != "posix", reason="needs fork and signals")
@pytest.mark.parametrize(
    ("there", "how"), [("missing", "exchange"), ("empty", "exchange"), ("old", "exchange"), ("old", "in place")]
)
def test_killed_at_any_call(tmp_path: Path, there: str, how: str) -> None:
    """There is the old folder, the new one, or one that the next call completes; and no call leaves anything else."""
    results = set()
    for calls in range(12):
        out = tmp_path / str(calls) / "out"
        out.parent.mkdir()
        if there == "empty":
            out.mkdir()
        if there == "old":
            fill(out, "old")
        process = os.fork()
        if process == 0:  # the interpreter is warm: a start of its own would take a second
            sys.argv = ["-c", str(out), str(calls), how]
            try:
                exec(KILLED, {})
            finally:
                os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        before = {name: text for name, text in texts(out).items() if name in ("data", "last")} if out.exists() else {}
        assert before in ({}, whole("old"), whole("new")) or READY in names(out), before
        assert "last" not in before or before in (whole("old"), whole("new"))
        finish_folder(out, "last")
        after = texts(out) if out.exists() else {}
        assert after in ({} if there != "old" else whole("old"), whole("new"))
        results.add((status, *sorted(after.items())))
        fill(out, "newest", replace=True)
        assert texts(out) == whole("newest")
        assert (names(out.parent), names(out)) == (["out"], ["data", "last"])
        shutil.rmtree(out.parent)
    new = tuple(sorted(whole("new").items()))
    assert (0, *new) in results
    assert (-signal.SIGKILL, *(sorted(whole("old").items()) if there == "old" else ())) in results


AT_ONCE = """
import sys
from simmp_fast.folders import atomic_folder
try:
    with atomic_folder(sys.argv[1], replace=sys.argv[2] == "replace", last="last") as temporary:
        for name in ("data", "last"):
            (temporary / name).write_text(sys.argv[3])
        print("ready", flush=True)
        sys.stdin.readline()
    print("done")
except FileExistsError as error:
    print(error.strerror)
"""


@pytest.mark.parametrize("there", ["missing", "empty"])
def test_of_several_at_once_one_wins(tmp_path: Path, there: str) -> None:
    out = tmp_path / "out"
    if there == "empty":
        out.mkdir()
    found = "data, last" if there == "empty" else "something"
    assert sorted(at_once(out, "keep")) == sorted(["done", *[f"{found} was put there meanwhile"] * 2])
    assert names(tmp_path) == ["out"]
    assert names(out) == ["data", "last"]
    assert len(set(texts(out).values())) == 1


def test_several_that_replace_at_once(tmp_path: Path) -> None:
    out = tmp_path / "out"
    fill(out, "old")
    assert at_once(out, "replace") == ["done"] * 3
    assert (names(tmp_path), names(out)) == (["out"], ["data", "last"])
    assert len(set(texts(out).values())) == 1
    assert "old" not in texts(out).values()


def at_once(out: Path, mode: str) -> list[str]:
    """What three processes say that are all ready before any goes on."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", AT_ONCE, str(out), mode, text],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )
        for text in "abc"
    ]  # fmt: skip
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    return [process.communicate(timeout=60)[0].strip() for process in processes]


def test_a_link_of_the_name_of_what_is_ready_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / READY).symlink_to(tmp_path / "mine")
    finish_folder(tmp_path / "out", "last")
    assert texts(tmp_path / "mine") == {"file": "mine"}
