"""Overlays and curves: right files, right colours, clear errors, nothing left behind."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from simmp_fast.pictures import (
    MAX_ROWS,
    PALETTE,
    Sample,
    _literal,
    _smooth,
    _tint,
    colour,
    save_curves,
    save_overlay,
    save_overlays,
)

CLASSES = ("background", "liver", "spleen")
IMAGE = np.linspace(0, 1, 30 * 40).reshape(30, 40)
LABEL = np.zeros((30, 40), np.uint8)
LABEL[5:20, 5:20] = 1
LABEL[22:28, 20:35] = 2


def luminance(hexadecimal: str) -> float:
    red, green, blue = (int(hexadecimal[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("image", [IMAGE, IMAGE[None], np.stack([IMAGE] * 3), np.stack([IMAGE] * 2)])
@pytest.mark.parametrize(("truth", "prediction"), [(LABEL, LABEL), (None, LABEL), (LABEL, None), (None, None)])
def test_overlay(tmp_path: Path, image: np.ndarray, truth: np.ndarray | None, prediction: np.ndarray | None) -> None:
    path = tmp_path / "new" / "overlay.png"
    save_overlay(path, image, truth, prediction, CLASSES, title="case 1")
    panels = 1 + (truth is not None) + (prediction is not None)
    with Image.open(path) as picture:
        assert picture.size[0] == pytest.approx(348 * panels, abs=2)
    assert [p.name for p in path.parent.iterdir()] == ["overlay.png"]


def test_grid_grows_by_rows(tmp_path: Path) -> None:
    sample = Sample(IMAGE, LABEL, LABEL, "slice 3")
    save_overlays(tmp_path / "one.png", [sample], CLASSES)
    save_overlays(tmp_path / "three.png", [sample] * 3, CLASSES)
    with Image.open(tmp_path / "one.png") as one, Image.open(tmp_path / "three.png") as three:
        assert one.size[0] == three.size[0]
        assert three.size[1] > 2.2 * one.size[1]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "name",
    ["T$_{1$", r"$\frac{", "\u809d\U0001f600", "\x1b[31m\n\u202e\udce9", "x" * 5000],
)
def test_names_are_drawn_letter_by_letter(tmp_path: Path, name: str) -> None:
    """No formula, no warning of missing letters, and a size that does not depend on the name."""
    sample = Sample(IMAGE, LABEL, LABEL, f"{name}, slice 3", aspect=1.3)
    save_overlays(tmp_path / "a.png", [sample], ("background", name, f"{name}b"), name)
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (1044, 432)


def test_names_as_they_are_drawn() -> None:
    assert _literal("a$b_c^d", 40) == r"a\$b_c^d"
    assert _literal("\u809d\u81d3 1", 40) == "\u25a1\u25a1 1"
    assert _literal("caf\u00e9\n\x1b", 40) == "caf\u00e9\\n\\x1b"
    assert _literal("a" * 30 + "b" * 30, 10) == "aaaaa\u2026bbbb"
    assert _literal("a" * 10, 10) == "a" * 10


def test_many_classes_and_odd_shapes(tmp_path: Path) -> None:
    names = [f"class {i}" for i in range(40)]
    label = np.arange(40, dtype=np.uint8).reshape(1, 40)
    save_overlay(tmp_path / "wide.png", np.zeros((1, 40)), label, label, names)
    save_overlays(tmp_path / "tall.png", [Sample(np.zeros((200, 3)), aspect=3.0)], CLASSES)


def test_fill_and_border() -> None:
    canvas = np.zeros((30, 40, 3))
    tinted = _tint(canvas, LABEL)
    assert (canvas == 0).all()
    assert (tinted[LABEL == 0] == 0).all()
    border, inside = tinted[5, 10], tinted[12, 12]
    assert tuple(np.rint(border * 255).astype(int)) == tuple(int(PALETTE[0][i : i + 2], 16) for i in (1, 3, 5))
    np.testing.assert_allclose(inside, 0.45 * border)


def test_neighbouring_colours_differ_in_lightness() -> None:
    light = [luminance(c) for c in PALETTE]
    assert min(abs(a - b) for a, b in pairwise(light)) > 0.12
    assert colour(1) == PALETTE[0]
    assert colour(len(PALETTE) + 1) == PALETTE[0]


def test_errors(tmp_path: Path) -> None:
    path = tmp_path / "overlay.png"
    with pytest.raises(ValueError, match=r"samples\[0\].truth: got shape \(30, 39\), expected \(30, 40\)"):
        save_overlay(path, IMAGE, LABEL[:, 1:], None, CLASSES)
    with pytest.raises(ValueError, match="prediction: got labels 0 to 2, expected 0 to 1"):
        save_overlay(path, IMAGE, None, LABEL, CLASSES[:2])
    with pytest.raises(ValueError, match="image: got shape"):
        save_overlay(path, np.zeros(4), None, None, CLASSES)
    with pytest.raises(ValueError, match="samples: got none"):
        save_overlays(path, [], CLASSES)
    with pytest.raises(ValueError, match="samples: got 101, expected at least one and at most 100"):
        save_overlays(path, [Sample(IMAGE)] * (MAX_ROWS + 1), CLASSES)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("steps", [0, 1, 300])
def test_curves(tmp_path: Path, steps: int) -> None:
    rows: list[dict[str, float]] = [
        {"step": s, "epoch": s // 10, "loss": 9 / (s + 1), "lr": 1e-4} for s in range(steps)
    ]
    rows += [{"epoch": e, "dice": min(0.9, e / 20)} for e in range(0, steps // 10, 2)]
    rows += [{"step": steps, "epoch": 0, "loss": float("nan")}, {"epoch": 0, "dice": float("nan")}]
    (tmp_path / "curves.png").write_bytes(b"the one before")
    save_curves(tmp_path / "curves.png", rows)
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.size == (1080, 408)
    assert [p.name for p in tmp_path.iterdir()] == ["curves.png"]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [1e308, -1.0, math.nan])
def test_curves_of_values_without_measure(tmp_path: Path, value: float) -> None:
    rows = [{"step": s, "loss": value if s % 2 else 1.0} for s in range(90)]
    rows += [{"epoch": e, "dice": value if e % 2 else 0.5} for e in range(9)]
    save_curves(tmp_path / "curves.png", [*rows, {"step": 1e308, "loss": 1.0}])
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.size == (1080, 408)


def test_running_mean() -> None:
    np.testing.assert_allclose(_smooth(np.arange(200.0)), np.arange(200.0))
    noisy = np.tile([0.0, 2.0], 100)
    assert np.ptp(_smooth(noisy)[20:-20]) < 0.3


def test_no_global_state(tmp_path: Path) -> None:
    """Drawing leaves pyplot alone, so it works in any thread and leaks no figure."""
    import sys

    loaded = "matplotlib.pyplot" in sys.modules
    save_curves(tmp_path / "curves.png", [])
    assert ("matplotlib.pyplot" in sys.modules) == loaded
