"""Array and volume files made to mislead: links to other files, sizes that are not there, bombs."""

from __future__ import annotations

import gzip
import io
import os
import struct
import tracemalloc
import warnings
import zipfile
import zlib
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pytest
from published_sets import write_arrays

from simmp_fast.data import hdf5_files, volume
from simmp_fast.data.errors import DataError
from simmp_fast.data.formats import read_image, read_label
from simmp_fast.messages import Note

GREY = np.arange(42, dtype=np.float32).reshape(6, 7)
MIB = 2**20


def npy(array: np.ndarray, shape: str | None = None, descr: str | None = None) -> bytes:
    """An npy file; with another shape or type in its header than the values have."""
    header = f"{{'descr': {descr or repr(array.dtype.str)}, 'fortran_order': False, 'shape': {shape or array.shape}, }}"
    padded = header.ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(padded)) + padded.encode() + array.tobytes()


def refused(path: Path, message: str) -> None:
    """Reading the file fails with the message, and takes little memory."""
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=rf"^{path}: {message}") as raised:
            read_image(path)
        assert tracemalloc.get_traced_memory()[1] < 32 * MIB
    finally:
        tracemalloc.stop()
    assert "\n" not in str(raised.value)
    assert "allow_pickle" not in str(raised.value)


def test_hdf5_links_into_other_files(tmp_path: Path) -> None:
    write_arrays(tmp_path / "secret.h5", image=GREY)
    os.mkfifo(tmp_path / "pipe.h5")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["image"] = h5py.ExternalLink("pipe.h5", "/image")
    refused(tmp_path / "a.h5", r"got 'image' as a link to '/image' in another file, 'pipe.h5'")
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["out"] = h5py.ExternalLink("secret.h5", "/")
        file["image"] = h5py.SoftLink("/out/image")
    refused(tmp_path / "b.h5", r"got 'image' as a link to '/' in another file, 'secret.h5', expected the array itself")
    with h5py.File(tmp_path / "c.h5", "w") as file:
        file.create_group("g/deep")["inner"] = h5py.ExternalLink("secret.h5", "/image")
        file["other"] = h5py.SoftLink("g/./deep/inner")
        file["img"] = h5py.SoftLink("/other")
    refused(tmp_path / "c.h5", r"got 'img' as a link to '/image' in another file, 'secret.h5'")


def test_hdf5_links_within_the_file(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["g/values"] = GREY
        file["g/near"] = h5py.SoftLink("values")
        file["image"] = h5py.SoftLink("/g/near")
    assert np.array_equal(read_image(tmp_path / "a.h5").array, GREY)
    for name, target, message in [
        ("b", "/image", "got 'image' as a link to '/image', which leads in a circle"),
        ("c", "/gone/image", "got 'image' as a link to '/gone', which is not there"),
        ("d", "gone", "got 'image' as a link to '/gone', which is not there"),
    ]:
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            file["image"] = h5py.SoftLink(target)
        refused(tmp_path / f"{name}.h5", message)


def test_hdf5_values_in_other_files(tmp_path: Path) -> None:
    (tmp_path / "secret.raw").write_bytes(GREY.tobytes())
    write_arrays(tmp_path / "secret.h5", image=GREY)
    layout = h5py.VirtualLayout((6, 7), "f4")
    layout[:] = h5py.VirtualSource(tmp_path / "secret.h5", "image", (6, 7))
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("image", (6, 7), "f4", external=[(str(tmp_path / "secret.raw"), 0, 168)])
        file.create_virtual_dataset("label", layout)
    refused(tmp_path / "a.h5", rf"got an array 'image' whose values lie in another file, '{tmp_path}/secret.raw'")
    with pytest.raises(DataError, match=rf"a\.h5: got a virtual array 'label', made of others \('{tmp_path}/secret"):
        read_label(tmp_path / "a.h5")


def test_hdf5_that_needs_a_plugin(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        properties.set_chunk((6, 7))
        properties.set_filter(32015, h5py.h5z.FLAG_OPTIONAL, (3,))
        space = h5py.h5s.create_simple((6, 7))
        dataset = h5py.h5d.create(file.id, b"image", h5py.h5t.IEEE_F32LE, space, properties)
        dataset.write_direct_chunk((0, 0), GREY.tobytes())
    refused(tmp_path / "a.h5", "got an array 'image' that is compressed by filter 32015 .*, which needs a plugin")


def test_hdf5_sizes_that_are_not_there(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        properties.set_chunk((2**14, 2**15))
        properties.set_deflate(9)
        space = h5py.h5s.create_simple((2**14, 2**15))
        dataset = h5py.h5d.create(file.id, b"image", h5py.h5t.IEEE_F32LE, space, properties)
        dataset.write_direct_chunk((0, 0), zlib.compress(GREY.tobytes()))
    refused(tmp_path / "a.h5", r"corrupt or truncated file \('image' announces 2147483648 bytes, but \d+ stored")
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file.create_dataset("image", (10**6, 10**6), "f4")
    refused(tmp_path / "b.h5", "got an array 'image' of which 1 of 1 parts were never written")
    with h5py.File(tmp_path / "c.h5", "w") as file:
        file.create_dataset("image", data=["a", "b"], dtype=h5py.string_dtype())
    refused(tmp_path / "c.h5", "got Python objects as 'image', expected numbers")


def test_a_sparse_file_of_terabytes(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        h5py.h5d.create(file.id, b"image", h5py.h5t.IEEE_F32LE, h5py.h5s.create_simple((10**6, 10**6)), properties)
    assert (tmp_path / "a.h5").stat().st_size > 2**41
    refused(tmp_path / "a.h5", r"'image' announces 3,725.3 GiB, expected at most [\d.]+ GiB \(64 GiB, or half of this")


def test_hdf5_chunks_that_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hdf5_files, "_LARGE_CHUNK", 0)
    for name, behind in (("good", 0), ("bad", 64 * MIB)):
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            dataset = file.create_dataset("image", (6, 7), "f4", chunks=(6, 7), compression="gzip")
            dataset.id.write_direct_chunk((0, 0), zlib.compress(GREY.tobytes() + bytes(behind)))
    assert np.array_equal(read_image(tmp_path / "good.h5").array, GREY)
    refused(tmp_path / "bad.h5", r".*the part of 'image' at \[0, 0\] unpacks to more than its 168 bytes\)")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        options = {"compression": "gzip", "shuffle": True, "fletcher32": True}
        file.create_dataset("image", data=GREY, chunks=(4, 5), **options)
        file.create_dataset("label", data=GREY, chunks=(4, 5), compression="lzf")
    assert np.array_equal(read_image(tmp_path / "a.h5").array, GREY)
    assert np.array_equal(read_label(tmp_path / "a.h5").array, GREY)


def pack(path: Path, content: bytes, method: int = zipfile.ZIP_DEFLATED, announced: int | None = None) -> Path:
    """An npz file of the member `image.npy`; its directory may announce another size."""
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("image.npy", content)
    if announced is not None:
        raw = bytearray(path.read_bytes())
        for signature, offset in ((b"PK\x01\x02", 24), (b"PK\x03\x04", 22)):
            struct.pack_into("<I", raw, raw.index(signature) + offset, announced)
        path.write_bytes(raw)
    return path


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            npy(GREY, "(1000000, 1000000)"),
            r"corrupt or truncated file \('image' has 296 bytes, expected 4000000000128\)",
        ),
        (npy(GREY, "(6, 6)"), r"corrupt or truncated file \('image' has 296 bytes, expected 272\)"),
        (npy(GREY, "(-6, -7)"), r"got 'image' of shape \[-6, -7\], expected sides of at least 0"),
        (npy(GREY, descr="'|O'"), "got Python objects as 'image', expected numbers"),
        (npy(GREY, descr="[('a', '<f4')]"), r"got values of type \[\('a', '<f4'\)\], expected numbers"),
        (npy(GREY, descr="'<c8'"), "got values of type complex64, expected numbers"),
        (npy(GREY, "(" * 90), "corrupt or truncated file"),
        (b"\x93NUMPY\x01\x00\xff\xff" + b" " * 65535, "corrupt or truncated file .*a header of at most 1000 bytes"),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\xff", r"corrupt or truncated file .*expected npy version 1\.0"),
        (b"\x80\x04K\x01.", "corrupt or truncated file .*expected npy version"),
        (b"", "corrupt or truncated file"),
    ],
)
def test_npz_members(tmp_path: Path, content: bytes, message: str) -> None:
    for method in (zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED):
        refused(pack(tmp_path / "a.npz", content, method), message)


def test_npz_bombs(tmp_path: Path) -> None:
    bomb = pack(tmp_path / "a.npz", npy(np.zeros((8, MIB), np.uint8)), announced=2**32 - 2)
    refused(bomb, r"corrupt or truncated file \('image' announces 4294967294 bytes, but \d+ stored bytes hold at most")
    behind = pack(tmp_path / "b.npz", npy(GREY) + bytes(8 * MIB))
    refused(behind, r"corrupt or truncated file \('image' has 8388904 bytes, expected 296\)")
    # The directory announces what the header does, and the compressed bytes go on.
    cut = pack(tmp_path / "c.npz", npy(GREY) + bytes(8 * MIB), announced=296)
    refused(cut, "corrupt or truncated file .*CRC")


def test_npz_archives(tmp_path: Path) -> None:
    with warnings.catch_warnings(), zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        warnings.simplefilter("ignore")
        archive.writestr("image.npy", npy(GREY))
        archive.writestr("image.npy", npy(GREY + 1))
    refused(tmp_path / "a.npz", "got 2 arrays 'image', expected one")
    refused(pack(tmp_path / "b.npz", npy(GREY), zipfile.ZIP_LZMA), "got 'image' compressed by method 14 of zip files")
    raw = bytearray(pack(tmp_path / "c.npz", npy(GREY)).read_bytes())
    raw[raw.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "c.npz").write_bytes(raw)
    refused(tmp_path / "c.npz", "got 'image' encrypted, expected an array that can be read without a password")
    (tmp_path / "d.npz").write_bytes(b"\x80\x04K\x01.")
    refused(tmp_path / "d.npz", r"corrupt or truncated file \(no zip file, which npz files are\)")
    with zipfile.ZipFile(tmp_path / "e.npz", "w") as archive:
        archive.writestr("\x1b[31m\n.npy", npy(GREY))
    refused(tmp_path / "e.npz", r"no array 'image' or 'img' in the file, got \\x1b\[31m\\n")


def test_constant_arrays_are_no_bombs(tmp_path: Path) -> None:
    """Of all that is compressed, an empty label map is the smallest."""
    empty = np.zeros((64, 512, 512), np.uint8)
    np.savez_compressed(tmp_path / "a.npz", label=empty)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("label", data=empty, compression="gzip", compression_opts=9, shuffle=True)
    nibabel.save(nibabel.Nifti1Image(empty, np.eye(4)), tmp_path / "a.nii.gz")
    for name in ("a.npz", "a.h5", "a.nii.gz"):
        assert (tmp_path / name).stat().st_size < empty.size / 200
        assert not read_label(tmp_path / name).array.any()


def nifti(array: np.ndarray, **fields: object) -> bytes:
    """A NIfTI file whose header may say something else."""
    content = nibabel.Nifti1Image(array, np.eye(4)).to_bytes()
    header = nibabel.Nifti1Header(content[:348], check=False)
    for key, value in fields.items():
        header[key] = value
    return header.binaryblock + content[348:]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"dim": [3, 32767, 32767, 32767, 1, 1, 1, 1]},
            r"corrupt or truncated file \(its header announces 70362301923\d+ b",
        ),
        ({"vox_offset": 1e12}, r"corrupt or truncated file \(its header announces 99999\d+ bytes, but"),
        ({"dim": [3, -5, -5, 3, 1, 1, 1, 1]}, r"got an array of shape \[-5, -5, 3\], expected sides of at least 0"),
        ({"dim": [3, 7, 6, 2, 1, 1, 1, 1]}, r"corrupt or truncated file \(got 436 bytes, expected 520"),
        ({"vox_offset": np.nan}, "corrupt or truncated file"),
        ({"sizeof_hdr": 7}, r"corrupt or truncated file \(a header of 7 bytes, expected 348\)"),
    ],
)
def test_nifti_headers(tmp_path: Path, fields: dict[str, object], message: str) -> None:
    content = nifti(np.arange(42, dtype=np.int16).reshape(7, 6, 1), **fields)
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(content))
    refused(tmp_path / "a.nii.gz", message)


def test_a_gzip_bomb_behind_a_small_header(tmp_path: Path) -> None:
    content = nifti(np.arange(42, dtype=np.int16).reshape(7, 6, 1))
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(content + bytes(64 * MIB)))
    refused(tmp_path / "a.nii.gz", "got over 1049012 bytes, expected 436 as its header says")
    (tmp_path / "b.nii.gz").write_bytes(gzip.compress(content + bytes(20)))
    assert read_image(tmp_path / "b.nii.gz").shape == (7, 6, 1)
    damaged = bytearray(gzip.compress(content + bytes(20)))
    damaged[-6] ^= 1
    (tmp_path / "c.nii.gz").write_bytes(damaged)
    refused(tmp_path / "c.nii.gz", "corrupt or truncated file .*CRC")


def test_values_that_grow_by_scaling_count_as_float64(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(volume, "MAX_BYTES", 1000)
    array = np.arange(200, dtype=np.uint8).reshape(10, 10, 2)
    (tmp_path / "a.nii").write_bytes(nifti(array))
    assert read_image(tmp_path / "a.nii").shape == (10, 10, 2)
    (tmp_path / "b.nii").write_bytes(nifti(array, scl_slope=2.0))
    refused(tmp_path / "b.nii", "its header announces")


def png(width: int, height: int, bits: int = 8, colour: int = 2) -> bytes:
    """A PNG file of one row, whose header says more."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 9)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("bits", [8, 16])
def test_pictures_that_announce_more_than_they_hold(tmp_path: Path, bits: int) -> None:
    (tmp_path / "a.png").write_bytes(png(30_000, 30_000, bits))
    refused(tmp_path / "a.png", r"corrupt or truncated file \(its header announces \d+ bytes, but \d+ stored bytes")
    (tmp_path / "b.png").write_bytes(png(2**31 - 1, 2**31 - 1, bits))
    refused(tmp_path / "b.png", "got 2147483647 x 2147483647 = 4611686014132420609 pixels, expected at most 1000000000")


def test_tiff_that_announces_more_than_it_holds(tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    data = io.BytesIO()
    tifffile.imwrite(data, np.arange(64, dtype=np.uint8).reshape(8, 8), compression="zlib", rowsperstrip=8)
    raw = bytearray(data.getvalue())
    with tifffile.TiffFile(io.BytesIO(raw)) as file:
        tags = {name: file.pages[0].tags[name] for name in ("ImageWidth", "ImageLength", "RowsPerStrip")}
        for tag in tags.values():
            code = "<H" if tag.dtype == 3 else "<I"
            struct.pack_into(code, raw, tag.valueoffset, 30_000)
    (tmp_path / "a.tif").write_bytes(raw)
    refused(tmp_path / "a.tif", r"corrupt or truncated file \(its header announces 900000000 bytes, but \d+ stored")


def test_a_bmp_file_that_announces_more_than_it_holds(tmp_path: Path) -> None:
    header = struct.pack("<2sIHHI", b"BM", 100, 0, 0, 54) + struct.pack(
        "<IiiHHIIiiII", 40, 30_000, 30_000, 1, 24, *[0] * 6
    )
    (tmp_path / "a.bmp").write_bytes(header + bytes(100))
    refused(tmp_path / "a.bmp", r"corrupt or truncated file \(its header announces 2700000000 bytes, but 154 stored")


def test_what_libraries_log_names_the_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.nii").write_bytes(
        nifti(np.arange(42, dtype=np.int16).reshape(7, 6, 1), qform_code=77, sform_code=88)
    )
    with pytest.warns(
        Note, match=rf"^{tmp_path}/a\.nii: qform_code 77 not valid; .*; sform_code 88 not valid; setting"
    ) as said:
        read_image(tmp_path / "a.nii")
    assert len(said) == 1
    tifffile = pytest.importorskip("tifffile")
    data = io.BytesIO()
    tifffile.imwrite(data, np.arange(64, dtype=np.uint8).reshape(8, 8), description="\x1b[31mred")
    (tmp_path / "b.tif").write_bytes(data.getvalue().replace(b"\x1b[31mred", b"\x1b[31m\xff\xff\x81"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        read_image(tmp_path / "b.tif")
    assert all(str(warning.message).startswith(f"{tmp_path}/b.tif: ") for warning in caught)
    assert not any(c in str(warning.message) for warning in caught for c in "\x1b\n")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("options", [{"rowsperstrip": 500}, {"tile": (512, 512)}, {"compression": "zlib"}])
def test_tiff_whose_strips_and_bits_do_not_fill_bytes(tmp_path: Path, options: dict[str, object]) -> None:
    tifffile = pytest.importorskip("tifffile")
    bits = np.random.default_rng(0).integers(0, 2, (901, 907)).astype(bool)
    tifffile.imwrite(tmp_path / "a.tif", bits, photometric="minisblack", **options)
    assert np.array_equal(read_label(tmp_path / "a.tif").array, bits)
    grey = np.random.default_rng(0).integers(0, 256, (901, 907)).astype(np.uint8)
    tifffile.imwrite(tmp_path / "b.tif", grey, **options)
    assert np.array_equal(read_image(tmp_path / "b.tif").array, grey)
