"""Where ``simmp-fast convert`` may write, looked at before the checkpoint is read."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from simmp_fast.cli import main
from simmp_fast.files import new_file


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x" * 300, "x: cannot be written (File name too long)"),
        ("a\0b", "a\\0b: got a name with a NUL character"),
        ("nowhere", "nowhere: got a link that leads nowhere, expected a folder"),
        ("loop/deep", "cannot be written (Too many levels of symbolic links)"),
        ("file/deep", "file: got a file, expected a folder"),
        ("file", "file: got a file, expected a folder"),
        ("full", "full, which is there already, expected a new or an empty folder"),
    ],
)
def test_folders_that_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, message: str) -> None:
    (tmp_path / "nowhere").symlink_to(tmp_path / "absent")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").touch()
    assert main(["convert", str(tmp_path / "none.pth"), "--out", str(tmp_path / name)]) == 2
    assert message in capsys.readouterr().err


def test_leftovers_of_killed_conversions_are_no_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with new_file(out / "model.safetensors") as mine:
        mine.touch()
    (out / re.sub("[0-9a-f]{12}-model", "0123456789ab-model", mine.name)).touch()  # an ended process of this number
    assert main(["convert", str(tmp_path / "none.pth"), "--out", str(out)]) == 2
    assert "none.pth" in capsys.readouterr().err
    assert os.listdir(out) == [mine.name]
