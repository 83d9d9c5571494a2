"""What lies in the folders of a data set and is no part of it is named, and harms nothing."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from small_sets import write_picture, write_yaml

from simmp_fast.cli import main
from simmp_fast.data.errors import DataError
from simmp_fast.data.folder import FolderSource
from simmp_fast.data.prepare import prepare
from simmp_fast.data.published import files_below, unmatched, wrong_folder

MASK = np.eye(6, 7, dtype=np.uint8)


def pair(root: Path, name: str, images: str = "images", masks: str = "masks", suffix: str = "") -> None:
    rng = np.random.default_rng(len(list(root.rglob("*"))))
    write_picture(root / images / f"{name}.png", rng.integers(0, 256, (6, 7)).astype(np.uint8))
    write_picture(root / masks / f"{name}{suffix}.png", MASK)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with three pairs and their YAML file."""
    for name in "abc":
        pair(tmp_path / "set", name)
    write_yaml(tmp_path / "set" / "set.yaml", name="set", classes=["no", "yes"])
    return tmp_path / "set"


def source(root: Path, **keys: object) -> FolderSource:
    return FolderSource(write_yaml(root / "set.yaml", **({"name": "set", "classes": ["no", "yes"]} | keys)))


def test_nothing_is_left_out_of_a_tidy_folder(root: Path) -> None:
    (root / "images" / ".DS_Store").touch()
    assert source(root).left_out == []


def test_other_files_and_folders_are_named(root: Path) -> None:
    for name in ("d.dcm", "notes.txt", "e"):
        (root / "images" / name).touch()
    (root / "masks" / "old").mkdir()
    (root / "masks" / "old.png").mkdir()
    found = source(root)
    assert found.left_out == [
        f"{root}/images/d.dcm: unknown kind of file",
        f"{root}/images/e: unknown kind of file",
        f"{root}/images/notes.txt: unknown kind of file",
        f"{root}/masks/old: a folder, not looked into",
        f"{root}/masks/old.png: a folder, not looked into",
    ]
    assert found.problems == []
    assert [case.id for case in found.cases] == ["a", "b", "c"]


def test_names_without_the_suffix_are_named(root: Path) -> None:
    pair(root, "d", masks="masks", suffix="_seg")
    found = source(root, mask_suffix="_seg")
    assert found.left_out == [f"{root}/masks/{name}.png: its name does not end in '_seg'" for name in "abc"]


def test_the_two_roles_of_one_folder_know_of_each_other(tmp_path: Path) -> None:
    for name in "abc":
        pair(tmp_path, f"{name}_t1", ".", ".", "_seg")
        os.rename(tmp_path / f"{name}_t1_seg.png", tmp_path / f"{name}_seg.png")
    (tmp_path / "cache").mkdir()
    write_picture(tmp_path / "d_t2.png", MASK)
    keys = {"images": ".", "masks": ".", "image_suffix": "_t1", "mask_suffix": "_seg"}
    assert source(tmp_path, **keys).left_out == [
        f"{tmp_path}/cache: a folder, not looked into",
        f"{tmp_path}/d_t2.png: its name does not end in '_t1'; its name does not end in '_seg'",
    ]


def test_the_folder_of_masks_inside_that_of_images_is_no_stranger(tmp_path: Path) -> None:
    for name in "abc":
        pair(tmp_path, name, ".")
    assert source(tmp_path, images=".").left_out == []
    assert source(tmp_path, images=".", masks="masks/*.png").left_out == []


def test_prepare_says_the_first_twenty(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(23):
        (root / "images" / f"{i:02d}.dcm").touch()
    assert main(["prepare", str(root / "set.yaml"), "--out", str(tmp_path / "out"), "--image-size", "32"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "data set 'set', left out: 23"
    assert lines[1] == f"  {root}/images/00.dcm: unknown kind of file"
    assert lines[20:] == [f"  {root}/images/19.dcm: unknown kind of file", "  ... and 3 more"]


def test_a_folder_without_usable_files_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    with pytest.raises(DataError, match=r"images: no images, expected files of kind .*; found nothing"):
        source(tmp_path)
    for i in range(9):
        (tmp_path / "images" / f"{i}.dcm").touch()
    with pytest.raises(DataError, match=r"found 0\.dcm, 1\.dcm, .*7\.dcm, \.\.\. \(9 names\)"):
        source(tmp_path)


def test_links_to_nothing_and_pipes_are_problems(root: Path) -> None:
    for name in "ab":
        (root / "images" / f"{name}.png").unlink()
    (root / "images" / "a.png").symlink_to("gone.png")
    os.mkfifo(root / "images" / "b.png")
    os.mkfifo(root / "images" / "pipe")
    found = source(root)
    assert found.problems == [
        f"{root}/images/a.png: a link to gone.png, which is not there",
        f"{root}/images/b.png: got a pipe or a device, expected a file",
    ]
    assert found.left_out == [f"{root}/images/pipe: unknown kind of file"]
    with pytest.raises(DataError, match="2 problems"):
        prepare(found, root.parent / "out", 32)


def test_a_file_where_a_folder_belongs(root: Path) -> None:
    with pytest.raises(DataError, match=r"images/a\.png: is no folder, expected a folder or a pattern \(images"):
        source(root, images="images/a.png")


def refuse(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """The system refuses to list a folder; the superuser, who may run the tests, is never refused."""
    scan, list_folder, access = os.scandir, os.listdir, os.access

    def check(path: object) -> None:
        if str(path) == str(folder):
            raise PermissionError(13, "Permission denied", str(path))

    def refusing(function):
        return lambda path=".": check(path) or function(path)

    monkeypatch.setattr(os, "scandir", refusing(scan))
    monkeypatch.setattr(os, "listdir", refusing(list_folder))
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != str(folder) and access(path, mode))


@pytest.mark.parametrize(("where", "closed"), [("images", "images"), ("*/*.png", "images"), ("**/*.png", "masks")])
def test_a_folder_that_cannot_be_read(root: Path, monkeypatch: pytest.MonkeyPatch, where: str, closed: str) -> None:
    refuse(monkeypatch, root / closed)
    with pytest.raises(DataError, match=f"set/{closed}: cannot be read .Permission denied"):
        source(root, images=where)


def test_a_pattern_that_makes_no_sense(root: Path) -> None:
    with pytest.raises(ValueError, match=r"images: got '\*\*x/\*\.png', expected a folder or a pattern"):
        source(root, images="**x/*.png")


def test_downloads_count_by_kind(tmp_path: Path) -> None:
    for name in ("a/1.cfg", "a/2.cfg", "a/3.nii.gz", "LICENSE", "b/x.txt", "b/.hidden"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert unmatched(tmp_path, files_below(tmp_path), [tmp_path / "a" / "3.nii.gz"]) == (
        f"{tmp_path}: 1 other file with a name of no known form, such as LICENSE",
        f"{tmp_path}: 2 .cfg files with a name of no known form, such as a/1.cfg",
        f"{tmp_path}: 1 .txt file with a name of no known form, such as b/x.txt",
    )


def test_a_download_that_links_to_itself_or_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.npz").touch()
    (tmp_path / "a" / "again").symlink_to(tmp_path)
    assert files_below(tmp_path) == [tmp_path / "a" / "1.npz"]
    refuse(monkeypatch, tmp_path / "a")
    with pytest.raises(DataError, match="a: cannot be read .Permission denied"):
        files_below(tmp_path)
    refuse(monkeypatch, tmp_path)
    with pytest.raises(DataError, match="cannot be read .Permission denied"):
        wrong_folder(tmp_path, "x")
