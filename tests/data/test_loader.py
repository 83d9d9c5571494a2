import random

import numpy as np
import pytest
import torch

from simmp_fast.data.cache import Cache, CacheWriter
from simmp_fast.data.errors import DataError
from simmp_fast.data.loader import slice_loader
from simmp_fast.data.preprocess import Geometry, Intensity, Recipe

COUNT, SIDE = 22, 16


@pytest.fixture(scope="module", params=["uint8", "float16"])
def cache(request, tmp_path_factory):
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("cache")
    recipe = Recipe("x", ("a", "b", "c"), 1, SIDE, Intensity("range", 0, 255))
    with CacheWriter(folder, recipe, COUNT + 3, request.param) as writer:
        for name, slices in (("one", 10), ("two", 12), ("three", 3)):
            images = rng.random((slices, 1, SIDE, SIDE), dtype=np.float32)
            labels = rng.integers(0, 3, (slices, SIDE, SIDE)).astype(np.uint8)
            writer.add(name, name, images, labels, labels, Geometry((slices, SIDE, SIDE)))
        writer.finish({"train": ["one", "two"], "validation": ["three"], "test": []})
    return Cache.open(folder)


def batches(cache, split="train", batch_size=4, **keys):
    return list(slice_loader(cache, split, batch_size, **keys))


def same(first, second):
    return len(first) == len(second) and all(
        torch.equal(a, b) for one, two in zip(first, second, strict=True) for a, b in zip(one, two, strict=True)
    )


def test_plain_batches_are_the_cache_in_order(cache):
    got = batches(cache, "train", shuffle=False, augment=False)
    assert [len(images) for images, _ in got] == [4] * 5 + [2]
    images, labels = torch.cat([b[0] for b in got]), torch.cat([b[1] for b in got])
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    expected = np.concatenate([[case.image(i) for i in range(case.slices)] for case in map(cache.case, ("one", "two"))])
    assert np.allclose(images, expected, atol=1e-7)
    assert images.min() >= 0
    assert images.max() <= 1
    assert np.array_equal(labels, cache.labels[:COUNT])


def test_shuffled_epochs_hold_every_slice_once(cache):
    orders = []
    for epoch in range(3):
        got = batches(cache, augment=False, seed=5, epoch=epoch, drop_last=False)
        labels = torch.cat([b[1] for b in got]).numpy()
        orders.append([int(np.flatnonzero((cache.labels == label).all((1, 2)))[0]) for label in labels])
        assert sorted(orders[-1]) == list(range(COUNT))
    assert orders[0] != orders[1] != orders[2]
    assert orders[0] != list(range(COUNT))


def test_the_same_with_any_number_of_workers(cache):
    one = batches(cache, seed=3, epoch=2)
    assert same(one, batches(cache, seed=3, epoch=2))
    assert same(one, batches(cache, seed=3, epoch=2, workers=2))
    assert not same(one, batches(cache, seed=4, epoch=2))
    assert not same(one, batches(cache, seed=3, epoch=1))


def test_every_position_comes_again(cache):
    whole = batches(cache, seed=3, epoch=1)
    for start in range(len(whole) + 1):
        loader = slice_loader(cache, "train", 4, seed=3, epoch=1, start_batch=start)
        assert len(loader) == len(whole) - start
        assert same(list(loader), whole[start:])


def test_no_global_seed_changes_the_data(cache):
    torch.manual_seed(1)
    random.seed(1)
    first = batches(cache, seed=3)
    torch.manual_seed(2)
    random.seed(2)
    assert same(first, batches(cache, seed=3))


def test_augmentation_of_a_slice_does_not_depend_on_its_batch(cache):
    small, large = batches(cache, batch_size=2, seed=1), batches(cache, batch_size=11, seed=1)
    assert torch.equal(torch.cat([b[0] for b in small]), torch.cat([b[0] for b in large]))


def test_last_batch(cache):
    assert len(batches(cache, batch_size=4)) == 5
    assert len(batches(cache, batch_size=4, drop_last=False)) == 6
    assert len(batches(cache, batch_size=4, shuffle=False)) == 6
    assert len(batches(cache, batch_size=4, shuffle=False, drop_last=True)) == 5
    (only,) = batches(cache, "validation", batch_size=4)
    assert len(only[0]) == 3


def test_ranks_share_the_batch_of_one_process(cache):
    one = batches(cache, batch_size=6, seed=7)
    shares = [batches(cache, batch_size=2, seed=7, rank=rank, ranks=3) for rank in range(3)]
    together = [
        tuple(torch.cat(parts) for parts in zip(*same_step, strict=True)) for same_step in zip(*shares, strict=True)
    ]
    assert same(one, together)
    with pytest.raises(DataError, match="got 3 slices in 'validation', expected at least 4"):
        slice_loader(cache, "validation", 2, ranks=2)


@pytest.mark.parametrize(
    "keys", [{"batch_size": 0}, {"start_batch": 6}, {"start_batch": -1}, {"rank": 1}, {"rank": 2, "ranks": 2}]
)
def test_arguments_out_of_range(cache, keys):
    (name,) = [key for key in keys if key != "ranks"]
    with pytest.raises(ValueError, match=f"{name}: got"):
        slice_loader(cache, "train", **({"batch_size": 4} | keys))


def test_an_empty_split(cache):
    with pytest.raises(DataError, match="'test' has no cases"):
        slice_loader(cache, "test", 4)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_slice_that_no_writer_of_caches_makes_is_named(tmp_path, workers):
    labels, images = np.zeros((3, 32, 32), np.uint8), np.zeros((3, 1, 32, 32), np.float32)
    labels[1, 5, 5], images[2, 0, 3, 3] = 7, np.nan
    recipe = Recipe("x", ("a", "b"), 1, 32, Intensity("range", 0, 255))
    with CacheWriter(tmp_path, recipe, 3, "float16") as writer:
        for name, i in (("good", 0), ("labels", 1), ("image", 2)):
            writer.add(name, name, images[i : i + 1], labels[i : i + 1], labels[i : i + 1], Geometry((1, 32, 32)))
        writer.finish({"train": ["good"], "validation": ["labels"], "test": ["image"]})
    cache = Cache.open(tmp_path, verify=True)
    assert len(list(slice_loader(cache, "train", 1, workers=workers))) == 1
    for split, message in (
        ("validation", r"labels.npy: damaged cache \(case labels: got labels 7, expected 0 to 1\)"),
        ("test", r"images.npy: damaged cache \(case image, slice 0: not finite\)"),
    ):
        with pytest.raises(DataError, match=message):
            list(slice_loader(cache, split, 1, workers=workers))
