"""Names with accents in either of their two forms, and names that are not UTF-8."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from small_sets import write_picture, write_yaml

from simmp_fast.cli import main
from simmp_fast.config import ConfigError
from simmp_fast.data import open_source
from simmp_fast.data.description import Description, SplitIds, read_description
from simmp_fast.data.errors import DataError
from simmp_fast.data.folder import FolderSource
from simmp_fast.data.names import forms
from simmp_fast.data.prepare import prepare
from simmp_fast.data.published import by_id, files_below
from simmp_fast.messages import printable

COMPOSED, DECOMPOSED = "caf\u00e9", "cafe\u0301"
STRANGE = os.fsdecode(b"caf\xe9")  # Latin-1
KEYS = {"name": "set", "classes": ["no", "yes"]}


def write(root: Path, image: str, mask: str) -> None:
    rng = np.random.default_rng(len(image) + len(list(root.rglob("*"))))
    write_picture(root / "images" / image, rng.integers(0, 256, (6, 7)).astype(np.uint8))
    write_picture(root / "masks" / mask, np.eye(6, 7, dtype=np.uint8))


def test_names_that_read_alike_pair_and_are_kept_composed(tmp_path: Path) -> None:
    write(tmp_path, f"{COMPOSED}1.png", f"{DECOMPOSED}1_{DECOMPOSED}.png")
    write(tmp_path, f"{DECOMPOSED}2.png", f"{COMPOSED}2_{COMPOSED}.png")
    write(tmp_path, "A.png", f"A_{COMPOSED}.png")
    write(tmp_path, "a.png", f"a_{COMPOSED}.png")
    split_ids = {"train": [f"{DECOMPOSED}1", "a"], "test": [f"{COMPOSED}2"]}
    path = write_yaml(tmp_path / "set.yaml", **KEYS, mask_suffix=f"_{DECOMPOSED}", split_ids=split_ids)
    source = FolderSource(path)
    assert source.problems == source.left_out == []
    assert [case.id for case in source.cases] == ["A", "a", f"{COMPOSED}1", f"{COMPOSED}2"]
    cache = prepare(source, tmp_path / "out", 32)
    assert cache.splits == {"train": [f"{COMPOSED}1", "a"], "validation": [], "test": [f"{COMPOSED}2"]}
    for form in (COMPOSED, DECOMPOSED):
        assert cache.case(f"{form}2").id == f"{COMPOSED}2"


def test_two_files_that_read_alike_have_one_id(tmp_path: Path) -> None:
    write(tmp_path, f"{COMPOSED}.png", f"{COMPOSED}.png")
    write_picture(tmp_path / "images" / f"{DECOMPOSED}.png", np.eye(6, 7, dtype=np.uint8))
    (problem,) = FolderSource(write_yaml(tmp_path / "set.yaml", **KEYS)).problems
    assert f"has the same id '{COMPOSED}' as" in problem
    assert problem.endswith("in other Unicode characters that read alike")


@pytest.mark.parametrize(("written", "there"), [(COMPOSED, DECOMPOSED), (DECOMPOSED, COMPOSED)])
def test_folders_and_patterns_are_found_in_either_form(tmp_path: Path, written: str, there: str) -> None:
    write(tmp_path, f"{there}.png", f"{there}.png")
    os.rename(tmp_path / "images", tmp_path / there)
    source = FolderSource(write_yaml(tmp_path / "set.yaml", **KEYS, images=written, masks=f"masks/{written}*.png"))
    assert [case.id for case in source.cases] == [COMPOSED]


def test_names_in_the_description_compare_composed() -> None:
    assert Description(DECOMPOSED, ("no", DECOMPOSED)) == Description(COMPOSED, ("no", COMPOSED))
    with pytest.raises(ConfigError, match="classes: got .*expected 2 to 256 different names"):
        Description("set", (COMPOSED, DECOMPOSED))
    with pytest.raises(ConfigError, match=f"split_ids: got {COMPOSED} more than once"):
        SplitIds((COMPOSED,), (), (DECOMPOSED,))
    assert SplitIds((COMPOSED,)).assign([DECOMPOSED])["train"] == [COMPOSED]


def test_published_ids_are_composed() -> None:
    problems: list[str] = []
    files = [Path(f"{DECOMPOSED}_1.bmp"), Path(f"{COMPOSED}_1.bmp")]
    assert by_id(files, r"(.+)_(\d)\.bmp", problems) == {f"{COMPOSED}_1": files[0]}
    assert problems == [f"{files[1]}: has the same id '{COMPOSED}_1' as {files[0]}"]


def test_forms_and_printable() -> None:
    assert forms("a") == ["a"]
    assert forms(DECOMPOSED) == [DECOMPOSED, COMPOSED]
    assert printable(f"{COMPOSED} {STRANGE} \ud800") == f"{COMPOSED} caf\\xe9 \\ud800"
    assert str(DataError(STRANGE)) == "caf\\xe9"


@pytest.mark.parametrize("name", ["images/{0}.png", "masks/{0}.png"])
def test_a_file_whose_name_is_not_utf8_is_a_problem(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    for good in "abcd":
        write(tmp_path, f"{good}.png", f"{good}.png")
    write(tmp_path, f"{STRANGE}.png", f"{STRANGE}.png")
    other = next(f for f in ("images", "masks") if f not in name)
    os.rename(tmp_path / other / f"{STRANGE}.png", tmp_path / other / "e.png")
    (tmp_path / "images" / f"{STRANGE}.dcm").touch()
    path = write_yaml(tmp_path / "set.yaml", **KEYS)
    assert main(["prepare", str(path), "--out", str(tmp_path / "out"), "--image-size", "32"]) == 2
    said = capsys.readouterr().err
    assert f"{tmp_path}/{name.format('caf' + chr(92) + 'xe9')}: its name is not UTF-8, expected one that is" in said
    assert f"{tmp_path}/images/caf\\xe9.dcm: unknown kind of file" in said


def test_folders_whose_names_are_not_utf8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inside = tmp_path / STRANGE
    for good in "abcd":
        write(inside, f"{good}.png", f"{good}.png")
    path = write_yaml(inside / "set.yaml", **KEYS)
    said = r"caf\\xe9.*: its name is not UTF-8"
    with pytest.raises(DataError, match=said):
        open_source(path)
    with pytest.raises(DataError, match=said):
        open_source("acdc", inside)
    with pytest.raises(DataError, match=r"(?s)cannot be used: 9 problems.*caf\\xe9/images/a\.png: its name"):
        files_below(tmp_path)
    outer = write_yaml(tmp_path / "set.yaml", **KEYS, images="caf*/images/*.png", masks="caf*/masks/*.png")
    assert len(FolderSource(outer).problems) == 8
    os.rename(inside, tmp_path / "good")
    out = os.fsdecode(os.fsencode(tmp_path) + b"/out\xff")
    assert main(["prepare", str(tmp_path / "good" / "set.yaml"), "--out", out, "--image-size", "32"]) == 2
    assert "out\\xff: its name is not UTF-8" in capsys.readouterr().err
    assert not Path(out).exists()


def test_yaml_text_that_utf8_cannot_hold(tmp_path: Path) -> None:
    for keys in (KEYS | {"name": "caf\udce9"}, KEYS | {"classes": ["no", "\ud800"]}):
        path = tmp_path / "set.yaml"
        path.write_text(json.dumps(keys))  # JSON is YAML, with the surrogate escaped
        with pytest.raises(ConfigError, match="(name|classes): got .*, expected text that UTF-8 can hold"):
            read_description(path)


@pytest.mark.parametrize(("make", "what"), [(Path.mkdir, "a folder"), (os.mkfifo, "a pipe or a device")])
def test_a_yaml_path_that_is_no_file(tmp_path: Path, make, what: str) -> None:
    make(tmp_path / "set.yaml")
    with pytest.raises(ConfigError, match=rf"set\.yaml: got {what}, expected a file"):
        open_source(tmp_path / "set.yaml")
    with pytest.raises(ConfigError, match="a folder, expected one of acdc, demo"):
        open_source(tmp_path)
