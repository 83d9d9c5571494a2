"""A split of a cache: rows, means, tables, files, and the Dice of training."""

from __future__ import annotations

import copy
import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from stand_ins import AFFINE, SIDE, LevelModel, make_cache

from simmp_fast.config import ModelConfig
from simmp_fast.data.cache import Cache
from simmp_fast.data.errors import DataError
from simmp_fast.data.preprocess import Geometry, Intensity, Recipe
from simmp_fast.evaluation.evaluate import case_dice, check_prepared_alike, evaluate
from simmp_fast.evaluation.metrics import measure
from simmp_fast.evaluation.report import Evaluation


def predicted_maps(cache: Cache, case_id: str) -> np.ndarray:
    """What the stand-in model predicts at native size."""
    small = np.rint(np.asarray(cache.case(case_id).images)[:, 0] / 127.5).astype(np.uint8)
    return small.repeat(2, axis=1).repeat(2, axis=2)


def test_rows_by_hand(model: LevelModel, cache: Cache) -> None:
    result = evaluate(model, cache, "test", protocol="strict")
    assert [(r.case, r.label, r.name) for r in result.rows[:3]] == [
        ("first", 1, "low"), ("first", 2, "high"), ("second", 1, "low"),
    ]  # fmt: skip
    for row in result.rows:
        case = cache.case(row.case)
        prediction, truth = predicted_maps(cache, row.case) == row.label, case.native_labels() == row.label
        spacing: tuple[float, ...] = (3.0, 0.5, 0.75)
        if row.case == "picture":  # scored in two dimensions
            prediction, truth, spacing = prediction[0], truth[0], spacing[1:]
        assert row.score == measure(prediction, truth, spacing)
        assert row.score.asd


def test_means_are_over_classes_then_cases(model: LevelModel, cache: Cache) -> None:
    result = evaluate(model, cache, "test")
    table = np.array([r.score.dice for r in result.rows]).reshape(3, 2)
    assert result.means()["dice"] == pytest.approx(table.mean())
    assert result.case_means()["second"]["dice"] == pytest.approx(table[1].mean())
    assert result.class_means()["high"]["dice"] == pytest.approx(table[:, 1].mean())
    assert result.cases == ["first", "second", "picture"]


@pytest.mark.parametrize("batch_size", [1, 2, 20])
def test_batch_size_does_not_matter(model: LevelModel, cache: Cache, batch_size: int) -> None:
    assert evaluate(model, cache, "test", batch_size=batch_size) == evaluate(model, cache, "test", batch_size=4)
    assert case_dice(model, cache, "test", batch_size=batch_size) == case_dice(model, cache, "test", batch_size=4)


def test_training_mode_and_state_stay(model: LevelModel, cache: Cache) -> None:
    model.train()
    model.norm.eval()
    before = copy.deepcopy(model.state_dict())
    evaluate(model, cache, "test")
    case_dice(model, cache, "test")
    with pytest.raises(DataError, match="classes"):
        evaluate(LevelModel(4), cache, "test")
    assert model.training
    assert model.drop.training
    assert not model.norm.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_case_dice_definition(model: LevelModel, cache: Cache) -> None:
    means = []
    for name in cache.splits["test"]:
        case = cache.case(name)
        prediction = np.rint(np.asarray(case.images)[:, 0] / 127.5)
        means.append(np.mean([measure(prediction == k, case.labels == k).dice for k in (1, 2)]))
    assert case_dice(model, cache, "test") == pytest.approx(means)
    shares = [case_dice(model, cache, "test", rank=rank, ranks=2) for rank in range(2)]
    assert shares == [pytest.approx(means[::2]), pytest.approx(means[1::2])]


@pytest.fixture
def partial(tmp_path: Path, recipe: Recipe) -> Cache:
    """`one` has no class "high" in truth or prediction, `missed` has it in truth only, `nothing` has no foreground."""
    blank = np.zeros((2, SIDE, SIDE), np.uint8)
    low, both = blank.copy(), blank.copy()
    low[:, 2:6, 2:6] = both[:, 2:6, 2:6] = 1
    both[:, 8:12, 8:12] = 2
    placed = Geometry(blank.shape, affine=AFFINE)
    images = (low / 2).astype(np.float32)[:, None]
    return make_cache(
        tmp_path / "partial", recipe,
        {"one": (images, low, placed), "missed": (images, both, placed), "nothing": (0 * images, blank, placed)},
    )  # fmt: skip


def test_strict_leaves_out_and_counts(model: LevelModel, partial: Cache) -> None:
    result = evaluate(model, partial, "test", protocol="strict")
    assert result.case_means()["one"]["dice"] == 1.0
    assert result.case_means()["missed"] == {"dice": 0.5, "hd95": 0.0, "jaccard": 0.5, "asd": 0.0}
    assert result.case_means()["nothing"]["dice"] is None
    assert result.means()["dice"] == 0.75
    assert result.class_means()["high"] == {"dice": 0.0, "hd95": None, "jaccard": 0.0, "asd": None}
    assert (result.undefined_distances, result.absent) == (1, 3)
    assert "1 have no distance" in result.table()
    assert "3 are in neither" in result.table()
    assert case_dice(model, partial, "test") == [1.0, 0.5]


def test_published_scores_every_pair(model: LevelModel, partial: Cache) -> None:
    result = evaluate(model, partial, "test", protocol="published")
    assert result.means()["dice"] == pytest.approx((0.5 + 0.5 + 0.0) / 3)
    assert (result.undefined_distances, result.absent) == (0, 0)


def test_case_dice_of_nothing(model: LevelModel, recipe: Recipe, tmp_path: Path) -> None:
    blank = np.zeros((1, SIDE, SIDE), np.uint8)
    images = np.zeros((1, 1, SIDE, SIDE), np.float32)
    cache = make_cache(tmp_path / "blank", recipe, {"blank": (images, blank, Geometry(blank.shape))})
    assert case_dice(model, cache, "test") == []
    assert case_dice(model, cache, "test", rank=1, ranks=2) == []


def test_unknown_and_empty_splits(model: LevelModel, cache: Cache) -> None:
    for split in ("holdout", "train"):
        with pytest.raises(DataError, match=f"split: got '{split}', expected one of 'levels' that holds cases: test"):
            evaluate(model, cache, split)


def make_pair(folder: Path, recipe: Recipe, first: Geometry, second: Geometry) -> Cache:
    """Two cases of two slices whose prediction is off by a pixel."""
    truth = np.zeros((2, SIDE, SIDE), np.uint8)
    truth[:, 4:9, 4:9] = 1
    images = (np.roll(truth, 1, axis=2) / 2).astype(np.float32)[:, None]
    return make_cache(folder, recipe, {"first": (images, truth, first), "second": (images, truth, second)})


def test_strict_says_when_no_file_states_its_spacing(model: LevelModel, recipe: Recipe, tmp_path: Path) -> None:
    shape = (2, SIDE, SIDE)
    stated = Geometry(shape, spacing=(3.0, 0.5, 0.75), affine=AFFINE)
    measured = evaluate(model, make_pair(tmp_path / "mm", recipe, stated, stated), "test", protocol="strict")
    silent = evaluate(
        model, make_pair(tmp_path / "none", recipe, Geometry(shape), Geometry(shape)), "test", protocol="strict"
    )
    assert (measured.rows[0].score.hd95, silent.rows[0].score.hd95) == (0.75, 1.0)
    assert measured.summary()["distance_unit"] == "mm"
    assert silent.summary()["distance_unit"] == "voxel"
    assert "HD95 [voxel]" in silent.table()
    assert "distances in voxels, as the files state no spacing; a class absent from both" in silent.table()
    assert silent.rows[0].score.dice == measured.rows[0].score.dice


def test_strict_refuses_to_average_millimetres_and_voxels(model: LevelModel, recipe: Recipe, tmp_path: Path) -> None:
    shape = (2, SIDE, SIDE)
    cache = make_pair(tmp_path / "both", recipe, Geometry(shape, affine=AFFINE), Geometry(shape))
    with pytest.raises(DataError, match="protocol 'strict': the files of second state no spacing and the others do"):
        evaluate(model, cache, "test", protocol="strict")
    assert len(evaluate(model, cache, "test", protocol="published").cases) == 2


@pytest.mark.parametrize("protocol", ["published", "strict"])
def test_table_names_what_it_shows(model: LevelModel, cache: Cache, protocol: str) -> None:
    result = evaluate(model, cache, "test", protocol=protocol)
    heading, convention, _, columns, *metrics = result.table().splitlines()
    assert heading == f"levels, split test, 3 cases, protocol {protocol}"
    assert "distances in" in convention
    assert columns.split() == ["mean", "low", "high"]
    assert [line.split()[0] for line in metrics[:4]] == ["Dice", "HD95", "Jaccard", "ASD"]
    assert len({len(line) for line in (columns, *metrics[:4])}) == 1
    assert f"[{'voxel' if protocol == 'published' else 'mm'}]" in metrics[1]


def test_save(model: LevelModel, partial: Cache, tmp_path: Path) -> None:
    results: dict[str, Evaluation] = {p: evaluate(model, partial, "test", protocol=p) for p in ("published", "strict")}
    for result in results.values():
        result.save(tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "test_published.csv", "test_published.json", "test_strict.csv", "test_strict.json",
    ]  # fmt: skip
    rows = list(csv.DictReader((tmp_path / "out" / "test_strict.csv").open()))
    assert [(r["protocol"], r["case"], r["class"], r["dice"], r["hd95"]) for r in rows[2:5]] == [
        ("strict", "missed", "low", "1.0", "0.0"),
        ("strict", "missed", "high", "0.0", ""),
        ("strict", "nothing", "low", "", ""),
    ]
    summary = json.loads((tmp_path / "out" / "test_strict.json").read_text())
    assert summary["protocol"] == "strict"
    assert summary["distance_unit"] == "mm"
    assert summary["mean"] == results["strict"].means()
    assert summary["per_class"]["high"]["hd95"] is None
    assert (summary["undefined_distances"], summary["absent"], summary["cases"]) == (1, 3, 3)


def test_data_prepared_alike(recipe: Recipe, tmp_path: Path) -> None:
    """The data set's name and the form of its accents may differ, whatever reaches the network may not."""
    classes = ("background", "l\u00e9sion", "high")
    image, label = np.zeros((1, 1, SIDE, SIDE), np.float32), np.zeros((1, SIDE, SIDE), np.uint8)
    found = replace(recipe, classes=classes)
    cache = make_cache(tmp_path / "cache", found, {"a": (image, label, Geometry(label.shape))})
    check_prepared_alike(
        replace(found, name="others", classes=("background", "le\u0301sion", "high")), cache, "data.json"
    )
    swapped = replace(found, classes=("background", "high", "l\u00e9sion"), image_size=32, channels=3)
    with pytest.raises(DataError, match=r"cache: differs from what .* \(data.json\): 3 problems") as error:
        check_prepared_alike(swapped, cache, "data.json")
    assert "image_size: got 16, expected 32" in str(error.value)
    assert "channels: got 1, expected 3" in str(error.value)
    assert "classes: got ['background', 'l\u00e9sion', 'high'], expected ['background', 'high'" in str(error.value)
    with pytest.raises(DataError, match="expected 'sagittal'"):
        check_prepared_alike(replace(found, slice_axis="sagittal"), cache, "data.json")
    with pytest.raises(DataError, match="intensity: got window 0.0 to 200.0, expected window 0.0 to 100.0"):
        check_prepared_alike(replace(found, intensity=Intensity("window", 0.0, 100.0)), cache, "data.json")


def test_a_network_for_other_data(model: LevelModel, cache: Cache) -> None:
    model.config = ModelConfig(classes=3, in_channels=3, image_size=64)
    message = "model: got in_channels 3, image_size 64, expected in_channels 1, image_size 16 as the data set 'levels'"
    for function in (evaluate, case_dice):
        with pytest.raises(DataError, match=message):
            function(model, cache, "test")
