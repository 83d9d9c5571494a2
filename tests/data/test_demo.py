import importlib.util
import itertools

import numpy as np
import pytest
from PIL import Image
from small_demo import demo_cache, needs_template

from simmp_fast.data import demo
from simmp_fast.data.errors import DataError
from simmp_fast.data.formats import read_image


def test_slabs_are_apart_and_of_the_size_that_is_told():
    ranges = sorted(demo.SLABS.values())
    assert all(second[0] - first[1] >= 5 for first, second in itertools.pairwise(ranges))
    slices = {name: sum(b - a for a, b in (demo.SLABS[i] for i in ids)) for name, ids in demo.SPLITS.items()}
    assert 70 <= slices["train"] <= 100
    assert slices["validation"] >= 10
    assert slices["test"] >= 10
    assert sorted(itertools.chain(*demo.SPLITS.values())) == sorted(demo.SLABS)


@needs_template
def test_labels_and_place_of_every_slab():
    source = demo.DemoSource()
    template = read_image(demo._file("t1"))
    for case in source.cases:
        image, label = case.load()
        first, stop = demo.SLABS[case.id]
        assert image.array.dtype == np.uint8
        assert image.array.shape == label.shape == (197, 233, stop - first)
        assert np.array_equal(image.array, template.array[..., first:stop])
        place = image.affine @ [1, 2, 3, 1]
        assert np.allclose(place, template.affine @ [1, 2, 3 + first, 1])
        assert np.array_equal(label == 0, image.array == 0)
        shares = np.bincount(label.ravel(), minlength=4)[1:] / (label > 0).sum()
        assert (shares > 0.03).all(), (case.id, shares)
    assert source.recipe(128).channels == 1
    assert len(source.recipe(128).classes) == 4


@needs_template
def test_white_matter_is_brighter_than_grey_and_grey_than_the_rest():
    for case in demo.DemoSource().cases:
        image, label = case.load()
        other, grey, white = (image.array[label == i].mean() for i in (1, 2, 3))
        assert other < grey < white


@needs_template
def test_demo_volume_is_a_nifti_file_in_its_place(tmp_path):
    demo.demo_volume(tmp_path / "test.nii.gz")
    volume = read_image(tmp_path / "test.nii.gz")
    expected, _ = next(case for case in demo.DemoSource().cases if case.id == "test").load()
    assert np.array_equal(volume.array, expected.array)
    assert np.allclose(volume.affine, expected.affine)


def test_without_nilearn(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install nilearn; or, from a cache .* simmp-fast demo --cache DIR"):
        demo.DemoSource()


def test_demo_slice_is_the_middle_of_the_test_slab(tmp_path, names):
    cache = demo_cache(tmp_path / "cache")
    demo.demo_slice(tmp_path / "out" / "slice.png", cache)
    with Image.open(tmp_path / "out" / "slice.png") as picture:
        assert picture.mode == "L"
        assert np.array_equal(picture, cache.case("test").images[2, 0])
    assert names(tmp_path / "out") == ["slice.png"]
