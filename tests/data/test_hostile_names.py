"""Names that a terminal would obey, and paths that are no files: a line each, and nothing waits."""

from __future__ import annotations

import json
import os
import re
import socket
from pathlib import Path

import numpy as np
import pytest
from published_sets import write_arrays
from small_sets import write_picture, write_yaml

from simmp_fast.config import ConfigError, from_mapping
from simmp_fast.data import open_source
from simmp_fast.data.description import Description, SplitIds, read_description
from simmp_fast.data.errors import DataError
from simmp_fast.data.folder import FolderSource
from simmp_fast.data.formats import EXTENSIONS, read_image, read_label
from simmp_fast.data.names import listed, name_problem, report
from simmp_fast.data.preprocess import Recipe
from simmp_fast.data.published import files_below
from simmp_fast.data.stacks import stack_case
from simmp_fast.messages import escaped, one_line, printable, why_no_file

RAW = "\x1b[31mred\a\x7f\x9b\u202e\u2066\u2028\t\r"
ESCAPED = r"\x1b[31mred\x07\x7f\x9b\u202e\u2066\u2028\t\r"


def test_control_characters_are_escaped() -> None:
    assert printable(f"a\n{RAW}\nb") == f"a\n{ESCAPED}\nb"
    assert escaped(f"a\n{RAW}") == f"a\\n{ESCAPED}"
    assert str(DataError(RAW)) == str(ConfigError(RAW)) == ESCAPED
    assert listed([RAW, "a\nb"]) == f"{ESCAPED}, a\\nb"
    assert report("two:", [RAW, "a\nb"]) == f"two:\n  {ESCAPED}\n  a\\nb"
    assert printable("\u0628\u200f \u00e9 \u809d") == "\u0628\u200f \u00e9 \u809d"
    assert one_line("a\n  b\tc") == "a b c"
    assert one_line("x" * 200 + "y" * 200, 30) == "x" * 20 + " ... " + "y" * 5


def test_names_that_cannot_be_kept() -> None:
    assert name_problem("a/b \u00e9.png") is None
    for name in ("a\nb", "a\x1b", "a\u202eb", "a\u2028"):
        assert name_problem(name) == "its name holds control characters, expected none: rename it"
    assert name_problem("\udce9").startswith("its name is not UTF-8")


@pytest.fixture
def named(tmp_path: Path) -> Path:
    """The YAML file of a set with a case, and pictures with a line break and an escape in their names."""
    for name in ("good", "new\nline", "\x1b[2J"):
        for folder, value in (("images", 1), ("masks", 1)):
            write_picture(tmp_path / folder / f"{name}.png", np.eye(6, dtype=np.uint8) * value)
    (tmp_path / "images" / "\x1bother\n.txt").touch()
    return write_yaml(tmp_path / "set.yaml", name="set", classes=["no", "yes"])


def test_files_with_such_names(named: Path) -> None:
    source = FolderSource(named)
    assert [case.id for case in source.cases] == ["good"]
    for file in (r"images/new\nline", r"images/\x1b[2J", r"masks/new\nline", r"masks/\x1b[2J"):
        why = "its name holds control characters, expected none: rename it"
        assert f"{named.parent}/{file}.png: {why}" in source.problems
    assert len(source.problems) == 4
    assert source.left_out == [f"{named.parent}/images/\\x1bother\\n.txt: unknown kind of file"]
    with pytest.raises(DataError, match=r"new\\nline\.png: its name holds control") as raised:
        files_below(named.parent)
    assert str(raised.value).count("\n") == 5
    with pytest.raises(DataError, match=r"/new\\nline\.png: its name holds control characters"):
        read_image(named.parent / "images" / "new\nline.png")


def test_a_pair_of_which_one_has_such_a_name(tmp_path: Path) -> None:
    write_picture(tmp_path / "images" / "a\nb.png", np.eye(6, dtype=np.uint8))
    write_picture(tmp_path / "masks" / "a.png", np.eye(6, dtype=np.uint8))
    problems = FolderSource(write_yaml(tmp_path / "set.yaml", name="set", classes=["no", "yes"])).problems
    assert len(problems) == 3
    assert not any("\n" in problem for problem in problems)


@pytest.mark.parametrize("text", ["li\x1b[31mver", "a\nb", "a\u202eb", "\x00", "", "  ", "x" * 201])
@pytest.mark.parametrize("key", ["name", "classes"])
def test_class_names_in_yaml(tmp_path: Path, text: str, key: str) -> None:
    keys = {"name": "set", "classes": ["background", "liver"]}
    keys |= {"name": text} if key == "name" else {"classes": ["background", text]}
    (tmp_path / "set.yaml").write_text(json.dumps(keys))
    with pytest.raises(ConfigError, match=rf"^{tmp_path}/set.yaml: {key}: got '.*expected") as raised:
        read_description(tmp_path / "set.yaml")
    assert not any(c in str(raised.value) for c in "\x1b\n\u202e\0")
    recipe = keys | {"channels": 1, "image_size": 32, "intensity": {"rule": "range", "low": 0, "high": 1}}
    with pytest.raises(ConfigError, match=f"^a: {key}: got|^{key}: got"):
        from_mapping(Recipe, recipe, "a")


def test_other_texts_in_yaml() -> None:
    for key in ("images", "masks"):
        with pytest.raises(ConfigError, match=rf"^{key}: got 'a\\nb', expected a folder or a pattern"):
            Description("set", ("no", "yes"), **{key: "a\nb"})
    with pytest.raises(ConfigError, match="classes: got 100000 names, .*expected 2 to 256 different names") as raised:
        Description("set", tuple(map(str, range(100_000))))
    assert len(str(raised.value)) < 300
    ids = tuple(map(str, range(50_000)))
    with pytest.raises(ConfigError, match=r"split_ids: got 0, 1, 10, .* \(50000 names\) more than once") as raised:
        SplitIds(ids, ids)
    assert len(str(raised.value)) < 200
    with pytest.raises(ConfigError, match=r"no such cases: \\x1b, a\\nb$"):
        SplitIds(("\x1b", "a\nb")).assign(["c"])


@pytest.mark.parametrize("ending", EXTENSIONS)
def test_paths_that_are_no_files(tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / f"pipe{ending}")
    os.symlink("/dev/zero", tmp_path / f"zero{ending}")
    os.symlink("gone", tmp_path / f"dangling{ending}")
    os.symlink(f"loop{ending}", tmp_path / f"loop{ending}")
    (tmp_path / f"folder{ending}").mkdir()
    with socket.socket(socket.AF_UNIX) as listening:
        monkeypatch.chdir(tmp_path)  # the name of a socket is short
        listening.bind(f"s{ending}")
    for name, message in [
        ("pipe", "got a pipe or a device, expected a file"),
        ("zero", "got a pipe or a device, expected a file"),
        ("s", "got a pipe or a device, expected a file"),
        ("dangling", "a link to gone, which is not there"),
        ("loop", "cannot be read (Too many levels of symbolic links)"),
        ("folder", "got a folder, expected a file"),
        ("none", "no such file"),
        ("x" * 260, "cannot be read (File name too long)"),
        ("y/" * 2100, "cannot be read (File name too long)"),
    ]:
        for read in (read_image, read_label):
            with pytest.raises(
                DataError, match=f"^{re.escape(str(tmp_path / (name + ending)))}: {re.escape(message)}$"
            ):
                read(tmp_path / (name + ending))
    with pytest.raises(DataError, match=r"a\\x00b.*: its name holds control characters"):
        read_image(tmp_path / f"a\0b{ending}")


def test_names_of_the_greatest_length(tmp_path: Path) -> None:
    for name in ("x" * 251, "\u00e9" * 125, "\U0001f600" * 62):
        path = write_arrays(tmp_path / f"{name}.npz", image=np.eye(6))
        assert np.array_equal(read_image(path).array, np.eye(6))


def test_why_a_path_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    assert why_no_file(tmp_path / "a") is None
    assert why_no_file(tmp_path / "a" / "b") == "cannot be read (Not a directory)"
    assert why_no_file("a\0b") == "no such file (its name holds a zero byte)"


def test_data_sets_that_are_not_there(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 300)
    for name in ("acdc", "isic2018", "segpc2021", "synapse"):
        with pytest.raises(DataError, match="cannot be read .File name too long.|no such folder"):
            open_source(name, long)
    for name in (str(long), "y/" * 3000):
        with pytest.raises(ConfigError, match=r"^data set: got '.*expected one of acdc") as raised:
            open_source(name)
        assert len(str(raised.value)) < 700
    with pytest.raises(ConfigError, match=r"x\.yaml: cannot be read .File name too long"):
        open_source(f"{long}.yaml")


def test_slice_numbers_of_any_size(tmp_path: Path) -> None:
    """The slices that are missing are counted, not listed."""
    problems: list[str] = []
    files = {n: tmp_path / f"{n}.npz" for n in (0, 2, 10**200)}
    stack_case("case", files, tmp_path, ("no", "yes"), problems)
    (problem,) = problems
    assert problem.startswith("case: no file of slices 1, 3, 4, 5, 6, 7, 8, 9, ... (9")
    problems.clear()
    stack_case("case", {0: tmp_path / "0", 2: tmp_path / "2", 5: tmp_path / "5"}, tmp_path, ("no", "yes"), problems, 4)
    assert problems == [
        "case: no file of slices 1, 3 (2 of 0 to 3 are missing)",
        f"{tmp_path}/5: a slice that the split has not, expected 0 to 3",
    ]
