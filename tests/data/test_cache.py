import json
import pickle
import subprocess
import sys

import numpy as np
import pytest

from simmp_fast.data.cache import Cache, CacheWriter, is_cache
from simmp_fast.data.errors import DataError
from simmp_fast.data.preprocess import Geometry, Intensity, Recipe

RNG = np.random.default_rng(0)


@pytest.fixture
def folder(tmp_path):
    """A cache of three cases of 2, 3 and 4 slices; image values tell case and slice."""
    recipe = Recipe("x", ("a", "b"), 1, 8, Intensity("range", 0, 255))
    with CacheWriter(tmp_path, recipe, 9, "uint8") as writer:
        for case, slices in enumerate((2, 3, 4)):
            images = np.full((slices, 1, 8, 8), case / 255, np.float32) + np.arange(slices)[:, None, None, None] / 25.5
            labels = np.full((slices, 8, 8), case % 2, np.uint8)
            native = RNG.integers(0, 2, (slices, 5, 6)).astype(np.uint8)
            writer.add(f"c{case}", f"{case}.nii", images, labels, native, Geometry((slices, 5, 6)))
        writer.finish({"train": ["c2", "c0"], "validation": [], "test": ["c1"]})
    return tmp_path


def test_cases_and_splits(folder):
    cache = Cache.open(folder, verify=True)
    assert (cache.name, cache.classes, cache.channels, cache.image_size) == ("x", ["a", "b"], 1, 8)
    case = cache.case("c1")
    assert case.images.shape == (3, 1, 8, 8)
    assert case.labels.shape == (3, 8, 8)
    assert (case.labels == 1).all()
    assert case.images[:, 0, 0, 0].tolist() == [1, 11, 21]
    assert np.allclose(case.image(2), 21 / 255)
    assert case.image(2).dtype == np.float32
    assert case.native_labels().shape == (3, 5, 6)
    assert case.source == "1.nii"
    assert cache.split_slices("train").tolist() == [5, 6, 7, 8, 0, 1]
    assert cache.split_slices("test").tolist() == [2, 3, 4]
    for split, message in (("validation", "no cases"), ("all", "expected one of train, validation, test")):
        with pytest.raises(DataError, match=message):
            cache.split_slices(split)
    with pytest.raises(ValueError, match="read-only"):
        cache.images[0] = 0


def test_the_writer_counts(tmp_path):
    recipe = Recipe("x", ("a", "b"), 1, 8, Intensity("range", 0, 255))
    with CacheWriter(tmp_path, recipe, 9, "uint8") as writer, pytest.raises(ValueError, match="got 0, expected the 9"):
        writer.finish({})


def test_another_process_maps_the_files_anew(folder):
    content = pickle.dumps(Cache.open(folder))
    assert len(content) < 500
    assert np.array_equal(pickle.loads(content).images, Cache.open(folder).images)


@pytest.mark.parametrize("name", ["images.npy", "labels.npy", "native_labels.bin"])
def test_damaged_files_are_named(folder, name):
    assert is_cache(folder)
    path = folder / name
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(DataError, match=f"{name}: damaged cache .its checksum differs"):
        Cache.open(folder, verify=True)
    path.write_bytes(content[:-1])
    with pytest.raises(DataError, match=f"{name}: damaged cache .got {len(content) - 1} bytes"):
        Cache.open(folder)
    path.unlink()
    with pytest.raises(DataError, match=f"{name}: missing"):
        Cache.open(folder)


def test_damaged_native_labels_are_named_when_they_are_read(folder):
    path = folder / "native_labels.bin"
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(DataError, match=r"native_labels\.bin: damaged cache .case c0"):
        Cache.open(folder).case("c0").native_labels()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "got cache version 2, expected 1"),
        ({"image_dtype": "float16"}, "its checksum differs"),
        ({"format": "other"}, "not the manifest"),
    ],
)
def test_a_changed_manifest(folder, change, message):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match=rf"manifest\.json: .*{message}"):
        Cache.open(folder)


def test_a_manifest_that_is_no_json_or_not_there(folder, tmp_path):
    path = folder / "manifest.json"
    path.write_text(path.read_text()[:50])
    with pytest.raises(DataError, match=r"manifest\.json: damaged cache"):
        Cache.open(folder)
    with pytest.raises(DataError, match="nowhere: not a prepared cache"):
        Cache.open(tmp_path / "nowhere")


def test_reading_needs_neither_nibabel_nor_nilearn_nor_h5py(folder):
    """A machine that only trains has none of them."""
    code = (
        "import sys\n"
        "for name in ('nibabel', 'nilearn', 'h5py', 'sklearn', 'matplotlib'): sys.modules[name] = None\n"
        "from simmp_fast.data import Cache, slice_loader\n"
        f"cache = Cache.open({str(folder)!r})\n"
        "cache.case('c0').native_labels()\n"
        "print(len(list(slice_loader(cache, 'train', 2))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "3", done.stderr
