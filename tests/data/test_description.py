import itertools

import pytest
from small_sets import write_yaml

from simmp_fast.config import ConfigError
from simmp_fast.data.description import Split, SplitIds, read_description
from simmp_fast.data.preprocess import Intensity

GOOD = {"name": "set", "classes": ["background", "one"]}


def test_defaults_and_every_key(tmp_path):
    description = read_description(write_yaml(tmp_path / "a.yaml", **GOOD))
    assert (description.images, description.masks, description.channels) == ("images", "masks", 1)
    assert description.intensity is None
    assert description.split == Split()
    keys = {
        "images": "scans/*.nii.gz",
        "masks": "truth",
        "image_suffix": "_t1",
        "mask_suffix": "_seg",
        "channels": 3,
        "intensity": {"rule": "window", "low": -125, "high": 275},
        "slice_axis": "coronal",
        "mask_values": {0: 0, 255: 1},
        "split_ids": {"train": ["a"], "test": ["b"]},
    }
    description = read_description(write_yaml(tmp_path / "b.yaml", **GOOD, **keys))
    assert description.intensity == Intensity("window", -125.0, 275.0)
    assert description.mask_values == {0: 0, 255: 1}
    assert description.split_ids == SplitIds(("a",), (), ("b",))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": 3}, "colour: unknown key, expected one of name, classes"),
        ({"split": {"seeed": 1}}, "split.seeed: unknown key"),
        ({"classes": "background"}, "classes: got 'background', expected a list"),
        ({"classes": ["background", 7]}, r"classes\[1\]: got 7, expected a str"),
        ({"classes": ["background"]}, "classes: got"),
        ({"channels": "one"}, "channels: got 'one', expected an int"),
        ({"channels": 2}, "channels: got 2, expected 1 or 3"),
        ({"slice_axis": "z"}, "slice_axis: got 'z', expected one of axial"),
        ({"intensity": "window"}, "intensity: got 'window', expected a mapping"),
        ({"intensity": {"rule": "window", "low": 0}}, "intensity.high: missing"),
        ({"intensity": {"rule": "window", "low": 9, "high": 0}}, "intensity.high: got 0"),
        ({"mask_values": {0: 0, 255: 2}}, "mask_values.255: got 2, expected 0 to 1"),
        ({"mask_values": {"white": 1}}, "mask_values key: got 'white', expected an int"),
        ({"split": {"train": 0.9}}, "split: got shares that add up to 1.2"),
        ({"split": {"train": -0.1}}, "split.train: got -0.1"),
        ({"split": {"test": 1.5}}, "split.test: got 1.5"),
        ({"split": {"test": float("nan")}}, "split.test: got nan"),
        (
            {"split": {"validation": 0.5, "test": 0.5}},
            r"split: got shares that add up to 1 \(train 0, validation 0.5, ",
        ),
        (
            {"split": {"validation": 0.6, "test": 0.5}},
            r"split: got shares that add up to 1.1 \(train 0, validation 0.6",
        ),
        ({"split_ids": {"train": []}}, "split_ids.train: got an empty list"),
        ({"split_ids": {"train": [7]}}, r"split_ids.train\[0\]: got 7, expected a str"),
        ({"split_ids": {"train": ["a", "b"], "test": ["b"]}}, "split_ids: got b more than once"),
        ({"split_ids": {"train": ["a"]}, "split": {"seed": 1}}, "split_ids: got split as well"),
    ],
)
def test_what_cannot_be_used_names_the_file_and_the_key(tmp_path, change, message):
    path = write_yaml(tmp_path / "bad.yaml", **(GOOD | change))
    with pytest.raises(ConfigError, match=f"bad.yaml: {message}"):
        read_description(path)


def test_missing_keys_and_files(tmp_path):
    with pytest.raises(ConfigError, match=r"a\.yaml: classes: missing"):
        read_description(write_yaml(tmp_path / "a.yaml", name="x"))
    with pytest.raises(ConfigError, match=r"none\.yaml: no such file"):
        read_description(tmp_path / "none.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1")
    with pytest.raises(ConfigError, match=r"broken\.yaml: cannot be read as YAML"):
        read_description(tmp_path / "broken.yaml")


def test_split_by_shares():
    ids = [f"case{i:02d}" for i in range(20)]
    parts = Split().assign(ids)
    assert [len(parts[k]) for k in ("train", "validation", "test")] == [14, 2, 4]
    assert sorted(itertools.chain(*parts.values())) == ids
    assert Split().assign(ids[::-1]) == parts
    assert Split(seed=1).assign(ids) != parts
    assert Split(1.0, 0, 0).assign(ids)["train"] == ids


@pytest.mark.parametrize(
    ("keys", "train"),
    [({}, 0.7), ({"validation": 0.2, "test": 0.2}, 0.6), ({"validation": 0}, 0.8), ({"test": 0.6}, 0.3)],
)
def test_training_takes_what_the_others_leave(keys, train):
    assert Split(**keys).train == train
    assert Split(**keys) == Split(**keys, train=train)


def test_small_sets_still_have_something_to_validate_and_test_on():
    parts = Split().assign(["a", "b", "c"])
    assert [len(part) for part in parts.values()] == [1, 1, 1]
    with pytest.raises(ConfigError, match="split: got 2 cases, expected at least 3"):
        Split().assign(["a", "b"])


def test_split_by_ids():
    assert SplitIds(("b",), (), ("a",)).assign(["a", "b", "c"]) == {"train": ["b"], "validation": [], "test": ["a"]}
    with pytest.raises(ConfigError, match=r"split_ids\.test: no such cases: x, y"):
        SplitIds(("a",), (), ("y", "x")).assign(["a"])
