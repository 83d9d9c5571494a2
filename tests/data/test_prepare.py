import errno
import os
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import yaml
from small_demo import needs_template
from small_sets import write_picture, write_volume, write_yaml

from simmp_fast.config import ConfigError
from simmp_fast.data import cache as cache_module
from simmp_fast.data import open_source
from simmp_fast.data import prepare as prepare_function
from simmp_fast.data.cache import Cache
from simmp_fast.data.errors import DataError
from simmp_fast.data.formats import read_label
from simmp_fast.data.preprocess import from_slices, network_input, resize_label
from simmp_fast.files import HashingWriter
from simmp_fast.folders import READY

RNG = np.random.default_rng(0)


def prepare(path, out, **keys):
    return prepare_function(open_source(path), out, 32, **keys)


def test_volumes(volumes, tmp_path, names):
    source, cache = open_source(volumes), prepare(volumes, tmp_path / "out")
    assert cache.images.dtype == np.float16
    assert cache.images.shape == (20, 1, 32, 32)
    assert cache.classes == ["background", "one", "two"]
    assert cache.splits == source.splits()
    for number, name in enumerate("abcd"):
        case = cache.case(name)
        image, label = source.cases[number].load()
        expected, placed = network_input(image, cache.recipe)
        assert np.array_equal(case.images, expected.astype(np.float16))
        assert np.array_equal(case.image(3), expected[3].astype(np.float16))
        assert case.geometry == placed
        assert case.spacing == (3.0, 1.5, 2.0)
        assert case.slices == 5
        assert case.native_labels().shape == case.native_shape == (5, 8, 9)
        assert np.array_equal(from_slices(case.native_labels(), case.geometry), label)
        assert np.array_equal(label, read_label(volumes.parent / "masks" / f"{name}.nii.gz").array)
        assert np.array_equal(case.labels, resize_label(case.native_labels(), (32, 32)))
        assert case.source == f"images/{name}.nii.gz"
    assert names(tmp_path) == ["out", "set"]


def test_pictures_are_kept_as_8_bit(pictures, tmp_path):
    cache = prepare(pictures, tmp_path / "out")
    assert cache.images.dtype == np.uint8
    assert cache.images.shape == (4, 3, 32, 32)
    image, _ = open_source(pictures).cases[1].load()
    expected, _ = network_input(image, cache.recipe)
    assert np.abs(cache.case("p1").image(0) - expected[0]).max() <= 0.5 / 255 + 1e-6


def test_equal_data_gives_equal_bytes(volumes, tmp_path, names):
    first, second = prepare(volumes, tmp_path / "one"), prepare(volumes, tmp_path / "two")
    assert first.checksum == second.checksum
    assert names(tmp_path / "one") == names(tmp_path / "two")
    for name in names(tmp_path / "one"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_explicit_ids_leave_the_other_cases_out(volumes, tmp_path):
    keys = yaml.safe_load(volumes.read_text()) | {"split_ids": {"train": ["c"], "test": ["a"]}}
    cache = prepare(write_yaml(volumes, **keys), tmp_path / "out")
    assert cache.splits == {"train": ["c"], "validation": [], "test": ["a"]}
    assert len(cache.images) == 10
    with pytest.raises(DataError, match="no case 'b'"):
        cache.case("b")


def test_every_bad_file_is_named_and_nothing_is_left(volumes, tmp_path, names):
    root = volumes.parent
    for name in ("e", "f", "g", "h", "i", "j", "k"):
        write_volume(root / "images" / f"{name}.nii.gz", RNG.integers(0, 100, (9, 8, 5)).astype(np.int16))
        write_volume(root / "masks" / f"{name}.nii.gz", np.ones((9, 8, 5), np.uint8))
    (root / "masks" / "a.nii.gz").unlink()
    (root / "images" / "b.nii.gz").unlink()
    write_volume(root / "masks" / "c.nii.gz", np.zeros((9, 8, 6), np.uint8))
    write_volume(root / "masks" / "d.nii.gz", np.full((9, 8, 5), 3, np.uint8))
    not_a_number = np.zeros((9, 8, 5), np.float32)
    not_a_number[0, 0, 0] = np.nan
    write_volume(root / "images" / "e.nii.gz", not_a_number)
    write_volume(root / "images" / "f.nii.gz", np.full((9, 8, 5), 4, np.int16))
    content = (root / "images" / "g.nii.gz").read_bytes()
    (root / "images" / "g.nii.gz").write_bytes(content[: len(content) // 2])
    shutil.copy(root / "images" / "j.nii.gz", root / "images" / "k.nii.gz")
    with pytest.raises(DataError) as caught:
        prepare(volumes, tmp_path / "deep" / "out")
    message = str(caught.value)
    for expected in (
        "'set' cannot be prepared: 8 problems",
        "images/a.nii.gz: an image without a mask",
        "masks/b.nii.gz: a mask without an image",
        "masks/c.nii.gz: got shape [9, 8, 6]",
        "masks/d.nii.gz: got labels 3",
        "images/e.nii.gz: 1 values are NaN or infinite",
        "images/f.nii.gz: a constant image",
        "images/g.nii.gz: corrupt or truncated",
        "images/k.nii.gz: holds the same image as images/j.nii.gz",
    ):
        assert expected in message, expected
    assert len(message.splitlines()) == 9
    assert names(tmp_path) == ["set"]


def test_values_and_channels_that_do_not_fit(pictures, tmp_path, names):
    keys = yaml.safe_load(pictures.read_text()) | {"channels": 1}
    with pytest.raises(DataError, match=r"p0\.jpg: got a colour picture, expected one channel(.|\n)*p3\.jpg"):
        prepare(write_yaml(pictures, **keys), tmp_path / "out")
    write_picture(pictures.parent / "in" / "p0.jpg", RNG.integers(0, 256, (12, 10)).astype(np.uint8))
    keys = keys | {"channels": 3, "intensity": {"rule": "range", "low": 0, "high": 1}}
    with pytest.raises(DataError, match=r"p0\.jpg: got values from .*expected 0 to 1"):
        prepare(write_yaml(pictures, **keys), tmp_path / "out")
    assert names(tmp_path) == ["pictures"]


def full_after(monkeypatch, writes):
    """The disk takes a number of writes and is full."""
    write, count = HashingWriter.write, iter(range(writes))

    def limited(self, data):
        if next(count, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, data)

    monkeypatch.setattr(HashingWriter, "write", limited)


@pytest.mark.parametrize("writes", [0, 1, 7])
def test_a_full_disk(volumes, tmp_path, names, monkeypatch, writes):
    full_after(monkeypatch, writes)
    with pytest.raises(DataError, match="out: the disk is full; nothing was left behind"):
        prepare(volumes, tmp_path / "made" / "out")
    assert names(tmp_path) == ["set"]


@pytest.mark.parametrize("failure", ["full disk", "interrupt"])
def test_a_failure_leaves_the_old_cache(volumes, tmp_path, names, monkeypatch, failure):
    old = prepare(volumes, tmp_path / "out").checksum
    if failure == "full disk":
        full_after(monkeypatch, 5)
    else:

        def interrupt(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(cache_module.CacheWriter, "finish", interrupt)
    with pytest.raises((DataError, KeyboardInterrupt)):
        prepare(volumes, tmp_path / "out", force=True)
    assert names(tmp_path) == ["out", "set"]
    assert Cache.open(tmp_path / "out", verify=True).checksum == old


def test_what_is_there_is_replaced_only_if_it_is_a_cache(volumes, tmp_path, names):
    out = tmp_path / "out"
    out.mkdir()
    prepare(volumes, out)
    with pytest.raises(DataError, match="out: already holds a prepared cache"):
        prepare(volumes, out)
    keys = yaml.safe_load(volumes.read_text()) | {"name": "other"}
    assert prepare(write_yaml(volumes, **keys), out, force=True).name == "other"
    for force in (False, True):
        with pytest.raises(DataError, match="set: the folder holds other files"):
            prepare(volumes, volumes.parent, force=force)
        with pytest.raises(DataError, match=r"set\.yaml: is a file"):
            prepare(volumes, volumes, force=force)
    with pytest.raises(DataError, match=r"set\.yaml/out: cannot be written"):
        prepare(volumes, volumes / "out")
    assert names(tmp_path) == ["out", "set"]


def test_files_beside_a_cache_are_not_replaced_with_it(volumes, tmp_path, names):
    out = tmp_path / "out"
    old = prepare(volumes, out).checksum
    (out / "notes.txt").write_text("precious")
    with pytest.raises(DataError, match="out: holds notes.txt beside the cache to replace, expected a cache alone"):
        prepare(volumes, out, force=True)
    assert (out / "notes.txt").read_text() == "precious"
    assert Cache.open(out, verify=True).checksum == old
    assert names(tmp_path) == ["out", "set"]


def test_a_folder_named_like_a_file_of_the_cache_is_not_replaced_with_it(volumes, tmp_path):
    out = tmp_path / "out"
    prepare(volumes, out)
    (out / "images.npy").unlink()
    (out / "images.npy").mkdir()
    (out / "images.npy" / "notes.txt").write_text("precious")
    with pytest.raises(DataError, match=r"out: holds images\.npy beside the cache to replace"):
        prepare(volumes, out, force=True)
    assert (out / "images.npy" / "notes.txt").read_text() == "precious"


@pytest.mark.parametrize("name", ["manifest.json", "images.npy", "native_labels.bin"])
def test_a_damaged_cache_can_be_replaced(volumes, tmp_path, names, name):
    out = tmp_path / "out"
    checksum = prepare(volumes, out).checksum
    (out / name).write_bytes(b"{")
    with pytest.raises(DataError, match=f"{name}: damaged cache .*run prepare again"):
        Cache.open(out)
    with pytest.raises(DataError, match="out: already holds a prepared cache; use force"):
        prepare(volumes, out)
    assert prepare(volumes, out, force=True).checksum == checksum
    assert names(tmp_path) == ["out", "set"]


@pytest.mark.parametrize("force", [False, True])
def test_what_is_put_there_meanwhile_is_kept(volumes, tmp_path, names, monkeypatch, force):
    out, finish = tmp_path / "out", cache_module.CacheWriter.finish

    def meanwhile(writer, splits):
        finish(writer, splits)
        monkeypatch.undo()
        prepare(volumes, out, force=True)

    monkeypatch.setattr(cache_module.CacheWriter, "finish", meanwhile)
    with pytest.raises(DataError, match="out: cannot be written .something was put there meanwhile"):
        prepare(volumes, out, force=force)
    Cache.open(out, verify=True)
    assert names(tmp_path) == ["out", "set"]


def test_the_next_prepare_completes_what_was_killed_as_it_moved_in(volumes, tmp_path, names):
    out = tmp_path / "out"
    checksum = prepare(volumes, out).checksum
    ready = out / READY
    ready.mkdir()
    for name in ("labels.npy", "manifest.json"):
        (out / name).rename(ready / name)
    with pytest.raises(DataError, match="out: not a prepared cache"):
        Cache.open(out)
    with pytest.raises(DataError, match="out: already holds a prepared cache"):
        prepare(volumes, out)
    assert Cache.open(out, verify=True).checksum == checksum
    assert names(out) == ["images.npy", "labels.npy", "manifest.json", "native_labels.bin"]


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("x" * 300, "x: cannot be written .File name too long"),
        ("/".join(["y" * 200] * 21), "y: cannot be written .File name too long"),
        ("a\0b", r"a\\0b: got a name with a NUL character"),
        ("a\ud800b", "got a name that this system cannot write"),
    ],
)
def test_names_that_no_folder_can_have(volumes, tmp_path, names, out, message):
    with pytest.raises(DataError, match=message):
        prepare(volumes, tmp_path / out)
    assert names(tmp_path) == ["set"]


def test_a_name_as_long_as_the_system_allows(volumes, tmp_path, names):
    name = "\u00e9" * 127
    prepare(volumes, tmp_path / name)
    assert names(tmp_path) == ["set", name]


def test_the_current_folder_is_not_replaced(volumes, tmp_path, names, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for out in (".", tmp_path / "here"):
        with pytest.raises(DataError, match="is the current folder, expected another one"):
            prepare(volumes, out)
    assert prepare(volumes, "new").folder.resolve() == tmp_path / "here" / "new"


def test_places_that_cannot_be_written_are_named_before_anything_is_read(volumes, tmp_path, monkeypatch):
    def read_nothing(*_):
        raise AssertionError

    source = open_source(volumes)
    monkeypatch.setattr(sys.modules["simmp_fast.data.prepare"], "check", read_nothing)
    with pytest.raises(DataError, match=r"set\.yaml/deep/out: cannot be written .Not a directory"):
        prepare_function(source, volumes / "deep" / "out", 32)
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: path not in (tmp_path, tmp_path / "empty"))  # even a superuser
    with pytest.raises(DataError, match=r"empty: cannot be written .Permission denied"):
        prepare_function(source, tmp_path / "empty", 32)
    with pytest.raises(DataError, match=r"new/out: cannot be written .Permission denied"):
        prepare_function(source, tmp_path / "new" / "out", 32)
    (tmp_path / "link").symlink_to(tmp_path / "link")
    with pytest.raises(DataError, match="link: cannot be written .Too many levels of symbolic links"):
        prepare_function(source, tmp_path / "link", 32)


@pytest.mark.parametrize("size", [0, -32, 16, 31, 33, 100])
def test_image_sizes_that_the_network_cannot_take(volumes, tmp_path, names, size):
    with pytest.raises(ConfigError, match=f"image_size: got {size}, expected a multiple of 32, at least 32"):
        prepare_function(open_source(volumes), tmp_path / "out", size)
    assert names(tmp_path) == ["set"]


REFUSALS = {
    "not enough memory: Unable to allocate 8.00 TiB for an array": MemoryError(
        "Unable to allocate 8.00 TiB for an array"
    ),
    "not enough memory": MemoryError(),
    "cannot be read (Permission denied)": PermissionError(errno.EACCES, "Permission denied"),
}


@pytest.mark.parametrize("phase", ["checking", "writing"])
@pytest.mark.parametrize(("message", "error"), REFUSALS.items(), ids=["numpy", "memory", "permission"])
def test_a_file_that_the_machine_cannot_load_is_named(volumes, tmp_path, names, phase, message, error):
    source = open_source(volumes)
    calls = iter((False, True) if phase == "writing" else (True, True))

    def load():
        if next(calls):
            raise error
        return good.load()

    good = source.cases[1]
    source.cases[1] = replace(good, load=load)
    (volumes.parent / "images" / "d.nii.gz").write_bytes(b"") if phase == "checking" else None
    with pytest.raises(DataError) as caught:
        prepare_function(source, tmp_path / "out", 32)
    lines = str(caught.value).splitlines()
    assert lines[0 if phase == "writing" else 1].strip() == f"images/b.nii.gz: {message}"
    assert len(lines) == (1 if phase == "writing" else 3)  # the heading, and the damaged file that comes later
    assert names(tmp_path) == ["set"]


def test_silent_where_standard_error_is_no_terminal(volumes, tmp_path, capsys):
    prepare(volumes, tmp_path / "out")
    assert capsys.readouterr() == ("", "")


@needs_template
def test_demo(tmp_path):
    cache = prepare_function(open_source("demo"), tmp_path / "out", 64)
    assert cache.images.dtype == np.uint8
    assert len(cache.split_slices("train")) == 82
    assert cache.case("test").native_shape == (16, 233, 197)
    assert set(np.unique(cache.labels)) == {0, 1, 2, 3}
