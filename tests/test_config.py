"""Presets, YAML files, overrides, and the messages for those that cannot be used."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

import pytest

from simmp_fast.config import (
    PRESETS,
    Config,
    ConfigError,
    ModelConfig,
    TrainConfig,
    fitting_windows,
    from_mapping,
    preset,
    resolve,
    to_mapping,
)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_survive_the_way_to_yaml_and_back(name: str) -> None:
    assert from_mapping(Config, to_mapping(preset(name))) == preset(name)


def test_published_presets() -> None:
    table = {n: (c.model.classes, c.model.clusters, c.model.feature_dim) for n, c in PRESETS.items() if n != "small"}
    assert table == {"synapse": (9, 9, 256), "acdc": (4, 4, 128), "segpc2021": (3, 3, 256), "isic2018": (2, 2, 256)}
    recipe = preset("synapse").train
    assert (recipe.lr, recipe.weight_decay, recipe.batch_size, recipe.epochs) == (1e-4, 1e-4, 20, 300)
    assert (recipe.seed, recipe.validate_from, recipe.wld_from, recipe.keep_every) == (2222, 100, 100, 50)


def test_precedence(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("train:\n  lr: 3e-4\n  batch_size: 4\nmodel:\n  depths: [1, 1, 1, 1]\n")
    config = resolve("acdc", file, ("train.batch_size=2", "model.window=7", "train.augment=false"))
    assert config.model.classes == 4, "from the preset"
    assert config.train.lr == 3e-4, "from the file"
    assert config.model.depths == (1, 1, 1, 1)
    assert config.train.batch_size == 2, "the command line wins"
    assert config.model.window == 7
    assert config.train.augment is False


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train:\n  learning_rate: 1\n", r"train.learning_rate: unknown key, expected one of epochs, batch_size"),
        ("trian:\n  lr: 1\n", "trian: unknown key, expected one of model, train"),
        ("train:\n  epochs: many\n", "train.epochs: got 'many', expected an int"),
        ("train:\n  epochs: true\n", "train.epochs: got True, expected an int"),
        ("train:\n  lr: fast\n", "train.lr: got 'fast', expected a float"),
        ("train:\n  augment: 1\n", "train.augment: got 1, expected a bool"),
        ("train: 3\n", "train: got 3, expected a mapping"),
        ("train:\n", "train: got None, expected a mapping"),
        ("", r"run.yaml: got nothing, expected a mapping of keys to values"),
        ("1: 2\n", "1: got a key of type int, expected one of model, train"),
        ("train:\n  on: 1\n", "train.True: got a key of type bool, expected one of epochs"),
        ("train:\n  epochs: 99999999999999999999\n", "train.epochs: got 9{20}, expected a whole number of at most 64"),
        ("train:\n  seed: 18446744073709551616\n", "train.seed: got 18446744073709551616, expected a whole number"),
        ("train:\n  ce_weight: -0.5\n", "train.ce_weight: got -0.5, expected at least 0"),
        ("train:\n  dice_weight: -1\n", "train.dice_weight: got -1.0, expected at least 0"),
        (
            "train:\n  ce_weight: 0\n  dice_weight: 0\n",
            r"train.ce_weight \+ train.dice_weight: got 0.0, expected",
        ),
        ("model:\n  depths: [1, 2]\n", "model.depths: got .*four numbers"),
        ("model:\n  depths: [1, 2, x, 1]\n", r"model.depths\[2\]: got 'x', expected an int"),
        ("model:\n  dmwla_size: 32\n", "third-stage grid of 2x2 tokens no window"),
        ("train:\n  lr: -1\n", "train.lr: got -1.0, expected a number above 0"),
        ("- a\n- b\n", "expected a mapping of keys to values"),
        ("a: [1\n", "cannot be read as YAML"),
    ],
)
def test_yaml_that_cannot_be_used(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        resolve("small", file)


def test_missing_yaml_unknown_preset_and_bad_override(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none.yaml: no such file"):
        resolve("small", tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="preset: got 'big', expected one of acdc, isic2018"):
        resolve("big")
    with pytest.raises(ConfigError, match="--set: got 'train.lr', expected section.key=value"):
        resolve("small", None, ("train.lr",))


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan", "'nan'", "1e400", "9" * 400])
@pytest.mark.parametrize("key", [f"train.{k}" for k in ("lr", "weight_decay", "ce_weight", "checkpoint_minutes")])
def test_numbers_without_end_are_refused(key: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"^{key}: got .*, expected a finite number"):
        resolve("small", None, (f"{key}={value}",))


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_numbers_without_end_are_refused_from_python(value: float) -> None:
    for name in [f.name for f in dataclasses.fields(TrainConfig) if f.type == "float"]:
        with pytest.raises(ConfigError, match=f"train.{name}: got {value}, expected a finite number"):
            TrainConfig(**{name: value})
    for name in ("update_rate", "key_momentum"):
        with pytest.raises(ConfigError, match=f"model.{name}: got {value}, expected a finite number"):
            ModelConfig(**{name: value})


@pytest.mark.parametrize("text", ["train..lr=1", ".lr=1", "train.=1", "=1", " =1"])
def test_overrides_name_a_whole_key(text: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"--set: got {text!r}, expected section.key=value")):
        resolve("small", None, (text,))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train.lr=[1", r"--set: got 'train.lr=\[1', whose value cannot be read as YAML: .*line 1"),
        ("train.lr={a: 1, a: 2}", "cannot be read as YAML: a: got this key twice"),
        ("train=3", "train: got 3, expected a mapping of keys to values"),
        ("train.lr.x=1", "train.lr: got {'x': 1}, expected a float"),
        ("train.lr=", "train.lr: got None, expected a float"),
    ],
)
def test_overrides_whose_value_cannot_be_used(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.compile(message, re.S)):
        resolve("small", None, (text,))


def test_a_value_does_not_wipe_out_a_section() -> None:
    with pytest.raises(ConfigError, match="train: got 3, expected a mapping"):
        resolve("small", None, ("train=3", "train.lr=1"))


def test_a_folder_and_a_picture_are_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"^{tmp_path}: got a folder, expected a file"):
        resolve("small", tmp_path)
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\xff")
    with pytest.raises(ConfigError, match=rf"^{tmp_path}/a.png: cannot be read as YAML: .*0x89"):
        resolve("small", tmp_path / "a.png")


def test_fitting_windows() -> None:
    assert fitting_windows(14, 14) == [2, 7]
    assert fitting_windows(28, 14) == [2, 7]
    assert fitting_windows(8, 8) == [2, 4]
    assert fitting_windows(2, 2) == []
    assert fitting_windows(13, 13) == []


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.seed=18446744073709551616", "got 18446744073709551616, expected a whole number of at most 64 bits"),
        ("train.seed=-1", "got -1, expected at least 0"),
        ("train.workers=1000000", "got 1000000, expected at most 1024 (each is a process)"),
        ("train.epochs=1e20", "got '1e20', expected an int"),
        ("train.epochs=1.0e+20", "got 1e+20, expected an int"),
        ("train.epochs=1000001", "got 1000001, expected at most 1000000 (no training is longer)"),
        ("train.batch_size=100000", "got 100000, expected at most 65536 (a batch lies in memory)"),
        ("train.overlays=101", "got 101, expected at most 100 (they are the rows of one picture)"),
        ("train.lr=1e9", "got 1000000000.0, expected at most 1000 (weights are far below it)"),
        ("train.weight_decay=1001", "got 1001.0, expected at most 1000"),
        ("train.checkpoint_minutes=1e7", "got 10000000.0, expected at most 1000000 (that is two years)"),
        ("train.keep_every=10000000000", "got 10000000000, expected at most 1000000000"),
        ("train.log_every=10000000000", "got 10000000000, expected at most 1000000000"),
        ("model.classes=257", "got 257, expected at most 256 (a label is one byte)"),
        ("model.in_channels=1025", "got 1025, expected at most 1024"),
        ("model.image_size=2080", "got 2080, expected at most 2048 (attention in the backbone needs memory"),
        ("model.dmwla_size=1000000000", "got 1000000000, expected at most 2048 (attention among all tokens"),
        ("model.dmwla_size=544", "got 544, expected at most 512: four times model.image_size, as the loss"),
        ("model.slots=100000000000", "got 100000000000, expected at most 100000 (every token attends"),
        ("model.clusters=5000", "got 5000, expected at most 4096"),
        ("model.feature_dim=100000000", "got 100000000, expected at most 8192"),
        ("model.decoder_feature_dim=8193", "got 8193, expected at most 8192"),
        ("model.depths=[1, 1, 1, 999999999]", "got (1, 1, 1, 999999999), expected at most 64 in a stage"),
        ("model.warmup_steps=10000000000", "got 10000000000, expected at most 1000000000"),
        ("model.memory_seed=-18446744073709551615", None),
        ("model.memory_seed=-18446744073709551616", "got -18446744073709551616, expected a whole number of at most 64"),
        ("model.window=99999999999", "got 99999999999, expected one of 2, 7 for a grid of 14x14"),
    ],
)
def test_numbers_beyond_measure(override: str, message: str | None) -> None:
    if message is None:
        assert resolve("small", None, (override,))
        return
    with pytest.raises(ConfigError, match=f"^{re.escape(override.partition('=')[0])}: {re.escape(message)}"):
        resolve("small", None, (override,))


def test_memory_is_counted_before_it_is_taken() -> None:
    banks = ("model.clusters=4096", "model.slots=100000", "model.feature_dim=8192")
    message = r"memory banks: got 62,5\d\d.\d GiB, expected at most 64 GiB"
    with pytest.raises(ConfigError, match=message):
        resolve("small", None, banks)
    with pytest.raises(ConfigError, match=r"images of a batch: got 1,024.0 GiB, expected at most 64 GiB"):
        resolve("small", None, ("train.batch_size=65536", "model.image_size=2048"))


@pytest.mark.parametrize(
    "text",
    [
        "train.lr=[1", "train.lr=!!python/object:os.system x", "train.lr=\x1b[31m", "train.lr=\0",
        "train.lr=" + "x" * 100_000, "x" * 100_000 + "=1", ".".join("a" * 50_000) + "=1",
        "train.seed=" + "9" * 30, "train.seed=" + "9" * 5000, "train.lr=2020-01-01", "train.lr=!!binary aaaa",
        "train={1: 2}", "train={.nan: 2}", "train={2020-01-01: 2}",
        "train={[a]: 1}", "train={!!binary aaaa: 1}", "train.lr={a: [*b]}", "train.lr=\n- a\nb", "train.\x1b[31mlr=1",
        "train.lr=" + "[" * 10_000, "train=" + "{a: " * 10_000, "train.lr=.nan", "train={'a\nb': 1}",
    ],
    ids=range(23),
)  # fmt: skip
def test_overrides_end_in_one_short_line(text: str) -> None:
    with pytest.raises(ConfigError) as raised:
        resolve("small", None, (text,))
    said = str(raised.value)
    assert said.startswith(("--set: got ", "train", "x" * 40))
    assert not any(character in said for character in "\n\x1b\0")
    assert len(said) < 700


def test_overrides_of_one_key_as_deep_as_they_go() -> None:
    """Several are laid over one another."""
    deep = ".".join(["a"] * 2000) + "=1"
    with pytest.raises(ConfigError, match=r"--set: got 'a\.a\..*, expected section.key=value"):
        resolve("small", None, (deep, deep))
