"""Pictures: which way up, transparent parts, kinds and sizes. Values are compared with those that made the file."""

import io
import struct
import zlib

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image
from small_sets import write_picture, write_yaml

from simmp_fast.data.errors import DataError
from simmp_fast.data.folder import FolderSource
from simmp_fast.data.formats import read_image, read_label

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (6, 9)).astype(np.uint8)
COLOUR = RNG.integers(0, 256, (6, 9, 3)).astype(np.uint8)
DEEP = RNG.integers(0, 65536, (6, 9, 4)).astype(np.uint16)
# What EXIF's numbers mean: where the first stored row and the first stored column are seen.
SEEN = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: np.rot90,
}


def exif(orientation):
    tags = Image.Exif()
    tags[274] = orientation
    return tags


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(path, array, depth, colour, *chunks):
    """A PNG file with any depth, rows [h, bytes], and chunks before the pixels."""
    height, width = array.shape[0], array.shape[1] * 8 // (depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour])
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in array)
    parts = [chunk(b"IHDR", header), *chunks, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def deep_png(path, array):
    path.write_bytes(imagecodecs.png_encode(np.ascontiguousarray(array)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_upright(tmp_path, orientation):
    seen, grey = SEEN[orientation](COLOUR), SEEN[orientation](GREY)
    Image.fromarray(COLOUR).save(tmp_path / "a.png", exif=exif(orientation))
    tifffile.imwrite(tmp_path / "a.tif", COLOUR, extratags=[(274, 3, 1, orientation, True)])
    tifffile.imwrite(tmp_path / "p.tif", COLOUR.transpose(2, 0, 1), photometric="rgb", planarconfig="separate",
                     extratags=[(274, 3, 1, orientation, True)])  # fmt: skip
    for name in ("a.png", "a.tif", "p.tif"):
        assert np.array_equal(read_image(tmp_path / name).array, seen), name
    Image.fromarray(GREY).save(tmp_path / "m.png", exif=exif(orientation))
    tifffile.imwrite(tmp_path / "m.tif", GREY, extratags=[(274, 3, 1, orientation, True)])
    for name in ("m.png", "m.tif"):
        assert np.array_equal(read_label(tmp_path / name).array, grey), name
    deep_png(tmp_path / "d.png", DEEP[..., :3])
    content = (tmp_path / "d.png").read_bytes()
    (tmp_path / "d.png").write_bytes(content[:33] + chunk(b"eXIf", exif(orientation).tobytes()[6:]) + content[33:])
    assert np.array_equal(read_image(tmp_path / "d.png").array, SEEN[orientation](DEEP[..., :3]))
    Image.fromarray(COLOUR).save(tmp_path / "a.jpg", exif=exif(orientation))
    Image.fromarray(COLOUR).save(tmp_path / "plain.jpg")
    plain = read_image(tmp_path / "plain.jpg").array
    assert np.array_equal(read_image(tmp_path / "a.jpg").array, SEEN[orientation](plain))


@pytest.mark.parametrize("number", [0, 9])
def test_orientations_that_say_nothing(tmp_path, number):
    Image.fromarray(GREY).save(tmp_path / "a.png", exif=exif(number))
    assert np.array_equal(read_image(tmp_path / "a.png").array, GREY)


@pytest.mark.parametrize("damage", [b"garbage", b"II*\0\x08\0\0", exif(6).tobytes()[6:13]])
def test_damaged_exif_says_nothing(tmp_path, damage):
    png(tmp_path / "a.png", GREY, 8, 0, chunk(b"eXIf", damage))
    assert np.array_equal(read_image(tmp_path / "a.png").array, GREY)
    Image.fromarray(GREY).save(tmp_path / "a.jpg", exif=b"Exif\0\0" + damage)
    assert read_image(tmp_path / "a.jpg").shape == GREY.shape


def test_a_photo_on_its_side_and_the_mask_of_what_is_seen(tmp_path):
    (tmp_path / "images").mkdir()
    Image.fromarray(COLOUR).save(tmp_path / "images" / "a.jpg", exif=exif(6))
    mask = np.rot90(GREY > 99, -1).astype(np.uint8)
    write_picture(tmp_path / "masks" / "a.png", mask)
    source = FolderSource(write_yaml(tmp_path / "s.yaml", name="s", classes=["no", "yes"], channels=3))
    image, label = source.cases[0].load()
    assert image.shape == (9, 6)
    assert np.array_equal(label, mask)


ALPHA = np.where(GREY > 99, 255, 0).astype(np.uint8)
FULL, FLAT = np.full_like(GREY, 255), np.full_like(GREY, 7)


@pytest.mark.parametrize("ending", ["png", "tif", "bmp"])
def test_alpha(tmp_path, ending):
    def written(*planes):
        path = tmp_path / f"a.{ending}"
        Image.fromarray(np.dstack(planes)).save(path)
        return path

    assert np.array_equal(read_image(written(COLOUR, FULL)).array, COLOUR)
    clear = int((ALPHA == 0).sum())
    for planes in ((COLOUR, ALPHA), (GREY, ALPHA))[: 1 if ending == "bmp" else 2]:
        with pytest.raises(DataError, match=rf"a\.{ending}: got {clear} of 54 pixels that are transparent"):
            read_image(written(*planes))
        with pytest.raises(DataError, match=rf"a\.{ending}: .*colours vary .*alpha from 0 to 255"):
            read_label(written(*planes))
    assert np.array_equal(read_label(written(GREY, GREY, GREY, FULL)).array, GREY)
    assert np.array_equal(read_label(written(FLAT, FLAT, FULL, ALPHA)).array, ALPHA)
    if ending == "bmp":  # has no grey with alpha
        return
    assert np.array_equal(read_image(written(GREY, FULL)).array, GREY)
    assert np.array_equal(read_label(written(GREY, FULL)).array, GREY)
    assert np.array_equal(read_label(written(FLAT, ALPHA)).array, ALPHA)
    assert not read_label(written(FULL, np.zeros_like(FULL))).array.any(), "nothing is drawn"


def test_deep_alpha(tmp_path):
    deep_png(tmp_path / "a.png", DEEP)
    with pytest.raises(DataError, match=r"a\.png: got \d+ of 54 pixels that are transparent"):
        read_image(tmp_path / "a.png")
    for channels in (1, 3):
        colours = DEEP[..., :channels]
        deep_png(tmp_path / "a.png", np.dstack([colours, np.full((6, 9), 65535, np.uint16)]))
        assert np.array_equal(read_image(tmp_path / "a.png").array, colours.squeeze())
        deep_png(tmp_path / "a.png", np.dstack([colours * 0 + 5, DEEP[..., 3]]))
        assert np.array_equal(read_label(tmp_path / "a.png").array, DEEP[..., 3])


def test_transparent_values(tmp_path):
    """A palette's index, a grey value, a colour (PNG, tRNS)."""
    picture = Image.fromarray(GREY % 3)
    picture.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    picture.save(tmp_path / "p.png", transparency=1)
    picture.save(tmp_path / "unused.png", transparency=bytes([255, 255, 255, 0]))
    Image.fromarray(GREY % 3).save(tmp_path / "g.png", transparency=1)
    Image.fromarray(COLOUR).save(tmp_path / "c.png", transparency=tuple(map(int, COLOUR[2, 3])))
    png(tmp_path / "two.png", RNG.integers(0, 256, (4, 3)).astype(np.uint8), 2, 0, chunk(b"tRNS", b"\0\2"))
    png(tmp_path / "one.png", RNG.integers(0, 256, (4, 3)).astype(np.uint8), 1, 0, chunk(b"tRNS", b"\0\1"))
    deep = DEEP[..., :3].astype(">u2")
    png(tmp_path / "d.png", deep.view(np.uint8).reshape(6, -1), 16, 2, chunk(b"tRNS", deep[0, 0].tobytes()))
    for name in ("p.png", "g.png", "c.png", "two.png", "one.png", "d.png"):
        with pytest.raises(DataError, match=rf"{name}: got \d+ of \d+ pixels that are transparent"):
            read_image(tmp_path / name)
    assert np.array_equal(read_image(tmp_path / "unused.png").array[..., 0], np.where(GREY % 3 == 1, 255, 0))
    for name in ("p.png", "g.png"):
        assert np.array_equal(read_label(tmp_path / name).array, GREY % 3)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_few_bits_are_grey_values_of_images_and_numbers_of_labels(tmp_path, bits):
    rows = RNG.integers(0, 256, (4, 5)).astype(np.uint8)
    values = np.unpackbits(rows, axis=1).reshape(4, -1, bits) @ (1 << np.arange(bits)[::-1])
    png(tmp_path / "a.png", rows, bits, 0)
    assert np.array_equal(read_label(tmp_path / "a.png").array, values)
    assert np.array_equal(read_image(tmp_path / "a.png").array, values * (255 // (2**bits - 1)))
    assert read_image(tmp_path / "a.png").array.dtype == np.uint8


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_png_of_16_bits_keeps_them(tmp_path, channels):
    array = DEEP[..., :channels].copy()
    if channels in (2, 4):
        array[..., -1] = 65535
    deep_png(tmp_path / "a.png", array.squeeze())
    got = read_image(tmp_path / "a.png")
    assert got.array.dtype == np.uint16
    assert np.array_equal(got.array, array[..., : 1 if channels < 3 else 3].squeeze())
    assert got.colour == (channels > 2)


def test_a_photo_of_two_views_is_its_first(tmp_path):
    first, second = (Image.fromarray(a) for a in (COLOUR, 255 - COLOUR))
    first.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[second], quality=95)
    first.save(tmp_path / "plain.jpg", quality=95)
    assert np.array_equal(read_image(tmp_path / "a.jpg").array, read_image(tmp_path / "plain.jpg").array)


def test_several_frames_and_other_kinds(tmp_path):
    frames = [Image.fromarray(a) for a in (GREY, 255 - GREY, GREY // 2)]
    frames[0].save(tmp_path / "film.png", save_all=True, append_images=frames[1:])
    with pytest.raises(DataError, match=r"film\.png: got 3 frames, expected one picture"):
        read_image(tmp_path / "film.png")
    Image.fromarray(COLOUR).convert("CMYK").save(tmp_path / "print.jpg")
    with pytest.raises(DataError, match=r"print\.jpg: got a picture in CMYK, expected grey, RGB"):
        read_image(tmp_path / "print.jpg")
    Image.fromarray(COLOUR).save(tmp_path / "web.png", format="GIF")
    with pytest.raises(DataError, match=r"web\.png: .*of another kind than PNG, JPEG, TIFF or BMP"):
        read_image(tmp_path / "web.png")
    Image.fromarray(COLOUR).save(tmp_path / "t.png", format="TIFF")
    assert np.array_equal(read_image(tmp_path / "t.png").array, COLOUR), "the content decides"


@pytest.mark.filterwarnings("error")
def test_large_pictures(tmp_path):
    row = np.zeros((1, 1800), np.uint8)
    row[0, 3] = 128
    png(tmp_path / "large.png", np.broadcast_to(row, (13200, 1800)), 1, 0)
    large = read_image(tmp_path / "large.png")
    assert large.shape == (13200, 14400)
    assert np.argwhere(large.array[7]).tolist() == [[24]]
    header = struct.pack(">IIBBBBB", 40000, 30000, 8, 2, 0, 0, 0)
    for name, content in {
        "huge.png": b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b""),
        "huge.bmp": b"BM" + struct.pack("<IIIIiiHHIIiiII", 0, 0, 54, 40, 40000, 30000, 1, 24, 0, 0, 0, 0, 0, 0),
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=rf"{name}: got 40000 x 30000 = 1200000000 pixels, expected at most"):
            read_image(tmp_path / name)


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    deep_png(tmp_path / "a.png", DEEP)
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, GREY)
    (tmp_path / "a.tif").write_bytes(buffer.getvalue())
    for name, package in {"a.png": "imagecodecs", "a.tif": "tifffile"}.items():
        monkeypatch.setitem(__import__("sys").modules, package, None)
        with pytest.raises(DataError, match=f"{name}: this kind of file needs {package}: pip install {package}"):
            read_image(tmp_path / name)
