"""TIFF: full depth, every layout; what is no grey or colour picture is refused."""

import itertools

import numpy as np
import pytest
import tifffile
from PIL import Image

from simmp_fast.data.errors import DataError
from simmp_fast.data.formats import read_image, read_label

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (6, 9)).astype(np.uint8)
COLOUR = RNG.integers(0, 256, (6, 9, 3)).astype(np.uint8)
DEEP = RNG.integers(272, 3360, (6, 9, 3)).astype(np.uint16)


@pytest.mark.parametrize("dtype", ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8"])
def test_every_type_keeps_its_values(tmp_path, dtype):
    for channels, byteorder in itertools.product((1, 3), "<>"):
        array = RNG.integers(0, 100, (6, 9, channels)).astype(dtype).squeeze()
        array[0, 0] = 0.3 if dtype[0] == "f" else -3 if dtype[0] == "i" else min(2**52, np.iinfo(dtype).max)
        photometric = "rgb" if channels == 3 else "minisblack"
        tifffile.imwrite(tmp_path / "a.tif", array, photometric=photometric, byteorder=byteorder)
        got = read_image(tmp_path / "a.tif")
        assert np.array_equal(got.array, array)
        assert got.array.dtype.isnative
        assert got.colour == (channels == 3)


@pytest.mark.parametrize(
    "options",
    [
        {"planarconfig": "separate"},
        {"compression": "lzw", "predictor": True},
        {"compression": "zlib", "tile": (16, 16)},
        {"rowsperstrip": 2, "bigtiff": True},
    ],
    ids=str,
)
def test_layouts(tmp_path, options):
    stored = DEEP.transpose(2, 0, 1) if "planarconfig" in options else DEEP
    tifffile.imwrite(tmp_path / "a.tif", stored, photometric="rgb", **options)
    assert np.array_equal(read_image(tmp_path / "a.tif").array, DEEP)


def test_jpeg_inside(tmp_path):
    smooth = np.broadcast_to(np.arange(0, 240, 5, dtype=np.uint8)[:, None], (48, 32))
    colour = np.dstack([smooth, smooth[::-1], smooth])
    tifffile.imwrite(tmp_path / "a.tif", colour, photometric="rgb", compression="jpeg", compressionargs={"level": 95})
    assert tifffile.TiffFile(tmp_path / "a.tif").pages[0].photometric.name == "YCBCR"
    assert np.abs(read_image(tmp_path / "a.tif").array.astype(int) - colour).max() < 8


@pytest.mark.parametrize(
    ("array", "seen"), [(GREY, 255 - GREY), (GREY + np.uint16(9), np.uint16(65526) - GREY), (GREY > 99, GREY <= 99)]
)
def test_white_is_zero(tmp_path, array, seen):
    tifffile.imwrite(tmp_path / "a.tif", array, photometric="miniswhite")
    assert np.array_equal(read_label(tmp_path / "a.tif").array, seen)
    assert np.array_equal(read_image(tmp_path / "a.tif").array, seen * 255 if seen.dtype == bool else seen)


@pytest.mark.parametrize(("factor", "dtype"), [(256, np.uint8), (257, np.uint8), (1, np.uint8), (250, np.uint16)])
def test_palette(tmp_path, factor, dtype):
    colours = RNG.integers(0, 256, (3, 256))
    indices = GREY % 5
    tifffile.imwrite(tmp_path / "a.tif", indices, colormap=(colours * factor).astype(np.uint16), photometric="palette")
    image = read_image(tmp_path / "a.tif")
    assert image.array.dtype == dtype
    assert np.array_equal(image.array, colours.T[indices] * (250 if factor == 250 else 1))
    assert np.array_equal(read_label(tmp_path / "a.tif").array, indices)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((6, 9, 4), {"extrasamples": [0]}, r"got 4 channels \(RGB, UNSPECIFIED\), expected 3, or 3 and alpha"),
        ((6, 9, 5), {}, r"got 5 channels \(RGB, UNSPECIFIED, UNSPECIFIED\), expected 3, or 3 and alpha"),
        ((6, 9, 2), {"photometric": "minisblack", "planarconfig": "contig"}, r"got 2 channels \(MINISBLACK, "),
        ((6, 9, 4), {"photometric": "separated"}, "got a picture in SEPARATED, expected grey, RGB"),
        ((6, 9, 3), {"photometric": "cielab"}, "got a picture in CIELAB, expected grey, RGB"),
        ((3, 16, 16), {"photometric": "minisblack", "volumetric": True, "tile": (1, 16, 16)}, "got 3 planes"),
        ((3, 6, 9), {"photometric": "minisblack"}, "got 3 frames, expected one picture"),
        ((3, 6, 9), {"photometric": "minisblack", "truncate": True}, "got 3 frames, expected one picture"),
        ((3, 6, 9), {"imagej": True, "photometric": "minisblack"}, "got 3 frames, expected one picture"),
    ],
)
def test_what_is_no_picture(tmp_path, shape, options, message):
    array = RNG.integers(0, 256, shape).astype(np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", array, **({"photometric": "rgb"} | options))
    with pytest.raises(DataError, match=r"a\.tif: " + message):
        read_image(tmp_path / "a.tif")


def test_pillows_ycbcr_and_complex_numbers(tmp_path):
    Image.fromarray(COLOUR).convert("YCbCr").save(tmp_path / "y.tif")
    with pytest.raises(DataError, match=r"y\.tif: got a picture in YCBCR, expected grey, RGB"):
        read_image(tmp_path / "y.tif")
    tifffile.imwrite(tmp_path / "n.tif", GREY)
    with tifffile.TiffFile(tmp_path / "n.tif", mode="r+") as file:
        file.pages[0].tags["PhotometricInterpretation"].overwrite(77)
    with pytest.raises(DataError, match=r"n\.tif: got a picture in 77, expected grey, RGB"):
        read_image(tmp_path / "n.tif")
    tifffile.imwrite(tmp_path / "c.tif", GREY.astype(np.complex64))
    with pytest.raises(DataError, match=r"c\.tif: got values of type complex64, expected numbers"):
        read_image(tmp_path / "c.tif")


def test_smaller_copies_do_not_count(tmp_path):
    with tifffile.TiffWriter(tmp_path / "thumbnail.tif") as file:
        file.write(GREY[::3, ::3], subfiletype=1, metadata=None)
        file.write(GREY, metadata=None)
    with tifffile.TiffWriter(tmp_path / "pyramid.tif") as file:
        file.write(GREY, subifds=1, metadata=None)
        file.write(GREY[::2, ::2], subfiletype=1, metadata=None)
    with tifffile.TiffWriter(tmp_path / "two.tif") as file:
        file.write(GREY, subifds=1, metadata=None)
        file.write(255 - GREY, metadata=None)
    assert np.array_equal(read_image(tmp_path / "thumbnail.tif").array, GREY)
    assert np.array_equal(read_image(tmp_path / "pyramid.tif").array, GREY)
    with pytest.raises(DataError, match=r"two\.tif: got 2 frames"):
        read_image(tmp_path / "two.tif")


@pytest.mark.parametrize("compression", [None, "lzw", "zlib"])
def test_missing_strips(tmp_path, compression):
    """Those that a header points to behind the file's end, and those that it leaves out."""
    array = RNG.integers(0, 256, (64, 64)).astype(np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", array, rowsperstrip=8, compression=compression)
    content = (tmp_path / "a.tif").read_bytes()
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        where = file.pages[0].tags["StripOffsets"].valueoffset
    (tmp_path / "a.tif").write_bytes(content[:where] + bytes(4) + content[where + 4 :])
    with pytest.raises(DataError, match=r"a\.tif: corrupt or truncated file \(7 of 8 strips or tiles are there\)"):
        read_image(tmp_path / "a.tif")
    (tmp_path / "a.tif").write_bytes(content[:-5])
    with pytest.raises(DataError, match=r"a\.tif: corrupt or truncated file \(7 of 8 strips or tiles are there\)"):
        read_image(tmp_path / "a.tif")


def test_pages_in_a_circle(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        for _ in range(3):
            file.write(GREY, metadata=None)
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        first, last = file.pages[0].offset, file.pages[2].offset
    content = bytearray((tmp_path / "a.tif").read_bytes())
    tags = int.from_bytes(content[last : last + 2], "little")
    following = last + 2 + 12 * tags
    content[following : following + 4] = first.to_bytes(4, "little")
    (tmp_path / "a.tif").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.tif: corrupt or truncated file \(its pages point in a circle\)"):
        read_image(tmp_path / "a.tif")


def test_labels(tmp_path):
    labels = (GREY % 4).astype(np.float64)
    tifffile.imwrite(tmp_path / "f.tif", labels)
    assert np.array_equal(read_label(tmp_path / "f.tif").array, labels)
    tifffile.imwrite(tmp_path / "half.tif", labels + 0.25)
    with pytest.raises(DataError, match=r"half\.tif: got label \d\.25, expected whole numbers"):
        read_label(tmp_path / "half.tif")
    for name, value in {"u.tif": np.uint64(2**64 - 1), "e.tif": np.float64(1e30), "b.tif": np.float64(2.0**63)}.items():
        array = labels.astype(value.dtype)
        array[3, 4] = value
        tifffile.imwrite(tmp_path / name, array)
        with pytest.raises(DataError, match=rf"{name}: got label .*, expected numbers of 64 bits"):
            read_label(tmp_path / name)
    tifffile.imwrite(tmp_path / "equal.tif", np.dstack([GREY] * 3).astype(np.uint16), photometric="rgb")
    assert np.array_equal(read_label(tmp_path / "equal.tif").array, GREY)


def test_pixels_that_are_marked_as_missing(tmp_path):
    """GDAL's mark is a value of the pixels, as text; one that no pixel has, or that is no number, says nothing."""

    def tag(text):
        return [(42113, "s", 0, text, True)]

    values = np.where(GREY > 200, np.float32(-9999), GREY)
    tifffile.imwrite(tmp_path / "a.tif", values, extratags=tag("-9999"))
    count = int((GREY > 200).sum())
    with pytest.raises(DataError, match=rf"a\.tif: {count} values are missing \(GDAL_NODATA = -9999\)"):
        read_image(tmp_path / "a.tif")
    assert np.array_equal(read_label(tmp_path / "a.tif").array, values)
    for text in ("-9999", "none"):
        tifffile.imwrite(tmp_path / "b.tif", GREY, extratags=tag(text))
        assert np.array_equal(read_image(tmp_path / "b.tif").array, GREY)
