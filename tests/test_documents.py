"""YAML and JSON: keys that stand twice, and texts made to take a reader down."""

from __future__ import annotations

from pathlib import Path

import pytest

from simmp_fast.config import ConfigError, read_json, read_yaml
from simmp_fast.documents import parse_json, parse_yaml, shown


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


@pytest.mark.parametrize("text", ["[" * 600, "{a: " * 600, "&a {<<: *a}" * 2], ids=["lists", "mappings", "itself"])
def test_deep_yaml_is_a_sentence(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_yaml(text)


def test_aliases_that_multiply_can_be_shown() -> None:
    lines = ["a: &a [x]"]
    for old, new in zip("abcdefgh", "bcdefghi", strict=True):
        lines.append(f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]")
    value = parse_yaml("\n".join(lines))
    assert len(shown(value)) < 10_000
    assert shown(parse_yaml("&a [*a]")) == "[[[[...]]]]"


@pytest.mark.parametrize(
    "text",
    ["a: 2020-99-99", "a: !!int x", "a: !!bool x", "a: !!timestamp x", "a: !!python/name:os.system", "? [a]\n: 1"],
)
def test_values_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_yaml(text)


@pytest.mark.parametrize("text", ["[" * 100_000, "{", "\x00", ""])
def test_bad_json(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_json(text)
