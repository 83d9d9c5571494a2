import errno
import json
import os
import pickle
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest

from simmp_fast.data.cache import Cache, CacheWriter, _checksum, is_cache
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


@pytest.mark.parametrize(
    ("error", "expected", "message"),
    [
        (OSError(errno.ENOMEM, "Cannot allocate memory"), OSError, "Cannot allocate"),
        (MemoryError("of 8 GiB"), MemoryError, "of 8 GiB"),
        (
            PermissionError(errno.EACCES, "Permission denied"),
            DataError,
            r"images\.npy: cannot be read \(Permission denied",
        ),
    ],
)
def test_what_the_machine_refuses_is_no_damage(folder, monkeypatch, error, expected, message):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(np, "load", refuse)
    with pytest.raises(expected, match=message):
        Cache.open(folder)


def test_a_manifest_that_is_a_pipe_is_not_opened(folder, monkeypatch):
    (folder / "manifest.json").unlink()
    os.mkfifo(folder / "manifest.json")
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: pytest.fail("waits for ever"))
    with pytest.raises(DataError, match=r"not a prepared cache \(manifest\.json: got a pipe or a device"):
        Cache.open(folder)
    assert not is_cache(folder)


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


def forge(folder, change):
    """A manifest that was changed by somebody who made its checksum anew."""
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    content.pop("checksum")
    change(content)
    path.write_text(json.dumps({"checksum": _checksum(content), **content}))


def put(*keys, value):
    def change(content):
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("image_dtype", value="float64"), "image_dtype: got 'float64', expected one of uint8, float16"),
        (put("files", value={}), "files: got none named images.npy, labels.npy, native_labels.bin"),
        (put("files", value=[]), "files: .*expected a mapping"),
        (put("files", "images.npy", "bytes", value=-1), "got -?[0-9]+ bytes, expected -1"),
        (put("files", "images.npy", "bytes", value=10**13), "bytes, expected 10000000000000"),
        (put("files", "native_labels.bin", "bytes", value=2.5), "files.native_labels.bin.bytes: got 2.5"),
        (put("cases", 1, "slices", value=-3), "case c1: got -3 slices, expected 3"),
        (put("cases", 1, "slices", value=10**13), "case c1: got 10000000000000 slices, expected 3"),
        (put("cases", 1, "slices", value="3"), "slices: got '3', expected an int"),
        (put("cases", 1, "first", value=0), "case c1: got [0-9]+ bytes at [0-9]+, slices at 0, expected those that"),
        (put("cases", 1, "native_first", value=-5), "case c1: got [0-9]+ bytes at -5, slices at 2, expected those"),
        (put("cases", 1, "geometry", "order", value=[0, 0, 5]), "case c1: got shape .* in the order .0, 0, 5."),
        (put("cases", 1, "geometry", "shape", value=[]), "case c1: got 3 slices, expected 1"),
        (put("cases", 1, "geometry", "shape", value=[3, 0, -6]), "case c1: got shape .3, 0, -6."),
        (put("cases", 1, "id", value="c0"), "cases: got one name twice"),
        (put("cases", 2, "native_bytes", value=10**12), "files.native_labels.bin: got [0-9]+ bytes, expected 1000000"),
        (put("splits", "test", value=["c1", "c9"]), "splits: got c9, expected names of cases"),
        (put("recipe", "channels", value=2), "channels: got 2"),
        (put("recipe", "image_size", value=64), "got uint8 .9, 1, 8, 8., expected uint8 .9, 1, 64, 64"),
    ],
)
def test_manifests_that_contradict_themselves(folder, change, message):
    forge(folder, change)
    with pytest.raises(DataError, match=rf"(manifest\.json|\.npy|\.bin): damaged cache .*{message}"):
        Cache.open(folder)


@pytest.mark.parametrize("text", ["[]", "3", "null", "[" * 100_000, '{"format": 1, "format": 2}', "\ud800"])
def test_manifests_that_are_another_json(folder, text):
    (folder / "manifest.json").write_text(text, encoding="utf-8", errors="surrogatepass")
    assert is_cache(folder) == (text not in ("[]", "3", "null"))  # damaged, or the file of another program
    with pytest.raises(DataError, match=r"manifest\.json: "):
        Cache.open(folder)
    (folder / "native_labels.bin").unlink()
    assert not is_cache(folder)


def test_folders_that_cannot_be(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name, message in (("x" * 300, "File name too long"), ("a\0b", "NUL"), ("link", "no such file")):
        with pytest.raises(DataError, match=message):
            Cache.open(tmp_path / name)


def replace_native(folder, case, content):
    """Other compressed labels for a case of the cache."""
    manifest = json.loads((folder / "manifest.json").read_text())
    parts, data = [], (folder / "native_labels.bin").read_bytes()
    for record in manifest["cases"]:
        parts.append(data[record["native_first"] :][: record["native_bytes"]])
    parts[case] = content
    (folder / "native_labels.bin").write_bytes(b"".join(parts))

    def change(content):
        first = 0
        for record, part in zip(content["cases"], parts, strict=True):
            record.update(native_first=first, native_bytes=len(part))
            first += len(part)
        content["files"]["native_labels.bin"]["bytes"] = first

    forge(folder, change)


@pytest.mark.parametrize("pixels", [0, 89, 91, 10**8])
def test_native_labels_are_decompressed_no_further_than_their_shape(folder, pixels):
    replace_native(folder, 1, zlib.compress(bytes(pixels)))
    case = Cache.open(folder).case("c1")
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=r"native_labels\.bin: damaged cache .case c1: expected 90 pixels, got"):
            case.native_labels()
        assert tracemalloc.get_traced_memory()[1] < 10**6
    finally:
        tracemalloc.stop()


def test_native_labels_that_end_early(folder):
    replace_native(folder, 1, zlib.compress(bytes(90))[:-2])
    with pytest.raises(DataError, match=r"native_labels\.bin: damaged cache .case c1"):
        Cache.open(folder).case("c1").native_labels()


def test_labels_that_are_no_class(folder):
    labels = np.zeros((3, 5, 6), np.uint8)
    labels[1, 2, 3:5] = 7, 2
    replace_native(folder, 1, zlib.compress(labels.tobytes()))
    small = np.load(folder / "labels.npy", mmap_mode="r+")
    small[3, 1, 1] = 255
    small.flush()
    cache = Cache.open(folder)
    with pytest.raises(DataError, match=r"native_labels\.bin: .*case c1: got labels 2, 7, expected 0 to 1"):
        cache.case("c1").native_labels()
    with pytest.raises(DataError, match=r"labels\.npy: .*case c1: got labels 255, expected 0 to 1"):
        cache.case("c1").checked_labels()
    assert (cache.case("c0").checked_labels() == 0).all()


def test_images_that_are_not_finite(tmp_path):
    recipe = Recipe("x", ("a", "b"), 1, 8, Intensity("range", 0, 255))
    images = np.zeros((2, 1, 8, 8), np.float32)
    images[1, 0, 3, 3] = np.inf
    zeros = np.zeros((2, 8, 8), np.uint8)
    with CacheWriter(tmp_path, recipe, 2, "float16") as writer:
        writer.add("c", "c.nii", images, zeros, zeros, Geometry((2, 8, 8)))
        writer.finish({"train": [], "validation": [], "test": ["c"]})
    case = Cache.open(tmp_path).case("c")
    case.image(0)
    with pytest.raises(DataError, match=r"images\.npy: damaged cache .case c, slice 1: not finite"):
        case.image(1)


def test_arrays_with_other_headers(folder):
    for content in (b"\x93NUMPY\x01\x00\x10\x00" + b"((((((((((((((((", b"PK\x05\x06" + bytes(18)):
        (folder / "labels.npy").write_bytes(content)
        forge(folder, put("files", "labels.npy", "bytes", value=len(content)))
        with pytest.raises(DataError, match=r"labels\.npy: damaged cache"):
            Cache.open(folder)
