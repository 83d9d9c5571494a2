"""YAML and JSON: keys that stand twice, and texts made to take a reader down."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from simmp_fast.config import ConfigError, read_json, read_yaml
from simmp_fast.documents import parse_json, parse_yaml
from simmp_fast.messages import shown


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr: 1\nepochs: 2\nlr: 3\n", "lr: got this key twice, in line 1 and in line 3, expected each key"),
        ("train:\n  a: 1\n  b: 2\n  a: 1\n", "a: got this key twice, in line 2 and in line 4"),
        ("- {x: 1}\n- {x: 1,\n   x: 2}\n", "x: got this key twice, in line 2 and in line 3"),
        ("mask_values: {1: 0, 0x1: 1}\n", "1: got this key twice, in line 1 and in line 1"),
        ('a: 1\n"a": 2\n', "a: got this key twice, in line 1 and in line 2"),
    ],
)
def test_a_key_twice_in_yaml(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError, match=f"^{tmp_path}/run.yaml: cannot be read as YAML: {message}"):
        read_yaml(tmp_path / "run.yaml")


def test_a_key_twice_in_json(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text('{"name": "x",\n "intensity": {"low": 0,\n  "high": 1,\n  "low" : 2}}')
    with pytest.raises(ConfigError, match=r"data.json: cannot be read as JSON: low: got this key twice, see line 2, 4"):
        read_json(tmp_path / "data.json")


def test_merge_keys_give_what_is_not_written() -> None:
    text = "base: &base {lr: 1, epochs: 2}\nhere: {<<: *base, lr: 3}\ndeep: {x: {<<: [*base, {seed: 4}], epochs: 5}}\n"
    found = parse_yaml(text)
    assert found["here"] == {"lr": 3, "epochs": 2}
    assert found["deep"] == {"x": {"lr": 1, "epochs": 5, "seed": 4}}


def test_a_mapping_that_merges_and_is_merged_is_no_key_twice() -> None:
    text = "a: &a {rate: 1}\nb: {c: {d: &d {<<: *a, rate: 2}}}\ne: {<<: *d}\n"
    assert parse_yaml(text)["e"] == {"rate": 2}


def multiplied(line: str) -> str:
    """Eight anchors, each ten times the one before."""
    lines = ["a: &a {x: 1}"]
    for old, new in zip("abcdefgh", "bcdefghi", strict=True):
        lines.append(f"{new}: &{new} " + line.format(", ".join([f"*{old}"] * 10)))
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 10_000, "nested too deeply, expected 32 levels at most"),
        ("{a: " * 10_000, "nested too deeply"),
        ("- " * 10_000, "nested too deeply"),
        ("? " * 10_000, "nested too deeply"),
        ("[" * 33 + "]" * 33, "nested too deeply"),
        ("&a [*a]", r"\*a: got an alias inside of what it stands for"),
        ("&a {<<: *a}", r"\*a: got an alias inside of what it stands for"),
        (multiplied("[{}]"), "got more than 200000 values .aliases written out."),
        (multiplied("{{<<: [{}]}}"), "got more than 200000 values .aliases written out."),
        ("- &a 1\n" + "- *a\n" * 1001, r"got more than 1000 aliases \(line 1002\)"),
        ("a: " + ":".join(["59"] * 50_000), "got a value of 149999 characters that is no text"),
        ("a: !!binary " + "A" * 4000, "got a value of 4000 characters that is no text"),
        ("a: !!int " + "9" * 4000, "got a value of 4000 characters that is no text"),
        ("x" * (2**20 + 1), "got 1048577 characters, expected at most 1048576"),
    ],
    ids=range(14),
)
def test_yaml_without_measure(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        parse_yaml(text)


def test_what_stays_within_measure() -> None:
    assert parse_yaml("[" * 32 + "]" * 32)
    assert parse_json("[" * 32 + "]" * 32)
    assert len(parse_yaml("- &a {x: 1, y: 2}\n" + "- *a\n" * 1000)) == 1001
    assert parse_yaml("a: " + "9" * 900) == {"a": int("9" * 900)}
    assert parse_yaml("a: " + "x" * 100_000) == {"a": "x" * 100_000}


@pytest.mark.parametrize(
    "text",
    [
        "a: [1", "a: !!python/object:os.system [x]", "x: !" + "f" * 100_000, "a: *" + "z" * 5000, "a: b\x00c",
        "a: \x1b",
        "a: b: c", "%YAML 9.9\n---\na", "a: 1\n---\nb: 2", "? [a]\n: 1", "a: &" + "z" * 999 + " [*" + "z" * 999 + "]",
    ],
    ids=range(11),
)  # fmt: skip
def test_messages_are_one_short_line(text: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_yaml(text)
    assert "\n" not in str(raised.value)
    assert "\x1b" not in str(raised.value)
    assert 10 < len(str(raised.value)) < 400


def test_a_key_that_a_terminal_would_obey() -> None:
    with pytest.raises(ConfigError, match=r"^\\x1b\[31m: got this key twice, in line 1 and in line 2"):
        parse_yaml('"\\x1b[31m": 1\n"\\x1b[31m": 2\n')
    assert str(ConfigError("a\x1b\u202e\r\n  b")) == "a\\x1b\\u202e\\r\n  b"


@pytest.mark.parametrize(
    "text",
    ["a: 2020-99-99", "a: !!int x", "a: !!bool x", "a: !!timestamp x", "a: !!python/name:os.system", "? [a]\n: 1"],
)
def test_values_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_yaml(text)


@pytest.mark.parametrize("text", ["[" * 100_000, "[" * 33 + "]" * 33, '{"a":' * 33, "{", "\x00", "", "9" * 10_000])
def test_bad_json(text: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_json(text)
    assert "\n" not in str(raised.value)


def test_a_key_twice_among_many() -> None:
    """The key is found in one pass."""
    text = "{" + ",".join(f'"{i}": 0' for i in range(100_000)) + ', "99999": 1}'
    with pytest.raises(ConfigError, match="^99999: got this key twice, see line 1, expected"):
        parse_json(text)


@pytest.mark.parametrize("read", [read_yaml, read_json])
def test_what_is_no_file(tmp_path: Path, read: Callable[[Path], object]) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to("gone")
    (tmp_path / "folder").mkdir()
    for name, message in [
        ("pipe", "got a pipe or a device, expected a file"),
        ("/dev/zero", "got a pipe or a device, expected a file"),
        ("folder", "got a folder, expected a file"),
        ("dangling", "a link to gone, which is not there"),
        ("none", "no such file"),
        ("x" * 300, r"cannot be read \(File name too long\)"),
        ("x" * 4 + "/y" * 4000, r"cannot be read \(File name too long\)"),
        ("a\0b", "no such file .its name holds a zero byte."),
    ]:
        with pytest.raises(ConfigError, match=f"{re.escape(name.replace(chr(0), chr(92) + 'x00'))}: {message}"):
            read(tmp_path / name)


def test_files_without_measure(tmp_path: Path) -> None:
    for name, read, most in (("a.yaml", read_yaml, 2**22), ("a.json", read_json, 2**30)):
        with open(tmp_path / name, "wb") as file:
            file.truncate(2**40)
        with pytest.raises(
            ConfigError, match=f"{name}: cannot be read as .*: got {2**40} bytes, expected at most {most}"
        ):
            read(tmp_path / name)


def test_values_are_shown_cut() -> None:
    for value, most in [("x" * 10**6, 203), (list(range(10**5)), 60), (10**5000, 60), ({"a": {"b": {"c": {}}}}, 40)]:
        assert len(shown(value)) < most
