"""Pictures: overlays of label maps on images, and the curves of a training run.

Classes are told apart three ways: by a palette that colour-blind readers can separate, by its steps in lightness, and
by the class index written into each region, which also survives a black and white print.
"""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from simmp_fast.data.errors import disk_errors
from simmp_fast.files import atomic_file
from simmp_fast.messages import escaped

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Image = NDArray[np.floating]
Labels = NDArray[np.integer]

# Okabe and Ito's hues, ordered so that neighbours in the list differ in lightness as well as in hue.
PALETTE = ("#E69F00", "#0072B2", "#F0E442", "#D55E00", "#56B4E9", "#009E73", "#F3B7D5", "#8C3B8F", "#B8E186", "#7A4B1E")
FILL = 0.45  # opacity of a class over the image
DPI = 120
MAX_ROWS = 100  # matplotlib draws at most 2^16 pixels on a side
LONGEST_NAME = 40  # letters of a class in the legend
LARGEST = 1e30  # in a curve
PER_INCH = 14  # letters of a row's title, about


@dataclass(frozen=True)
class Sample:
    """One row of an overlay picture.

    Attributes:
        image: [h, w], or [C, h, w] with 1 or 3 channels shown as grey or RGB and of any other number the first; 0..1.
        truth: [h, w] class indices, or None where none is known.
        prediction: [h, w] class indices, or None.
        title: printed beside the row, without its middle where it is too long.
        aspect: height of a pixel over its width.
    """

    image: Image
    truth: Labels | None = None
    prediction: Labels | None = None
    title: str = ""
    aspect: float = 1.0


def colour(label: int) -> str:
    """The colour of foreground class `label` (1, 2, ...); the palette repeats after its end."""
    return PALETTE[(label - 1) % len(PALETTE)]


def save_overlay(
    path: str | Path,
    image: Image,
    truth: Labels | None,
    prediction: Labels | None,
    classes: Sequence[str],
    title: str = "",
) -> None:
    """Write one slice as panels: image, truth and prediction, with a legend of the classes.

    Args:
        path: PNG file, replaced in one step if it exists.
        image: [h, w] or [C, h, w], 0..1.
        truth: [h, w] class indices, or None to leave the panel out.
        prediction: [h, w] class indices, or None to leave the panel out.
        classes: names by class index, background first.
        title: printed above the panels.

    Raises:
        ValueError: shapes that differ, or a label beyond `classes`.
    """
    save_overlays(path, [Sample(image, truth, prediction)], classes, title)


def save_overlays(path: str | Path, samples: Sequence[Sample], classes: Sequence[str], title: str = "") -> None:
    """Write several slices as one picture, a row each; see `save_overlay`.

    Raises:
        ValueError: no sample or more than `MAX_ROWS`, shapes that differ, or a label beyond `classes`.
    """
    if not 1 <= len(samples) <= MAX_ROWS:
        raise ValueError(f"samples: got {len(samples) or 'none'}, expected at least one and at most {MAX_ROWS}")
    for index, sample in enumerate(samples):
        _check_sample(f"samples[{index}]", sample, len(classes))
    names = [n for n in ("truth", "prediction") if any(getattr(s, n) is not None for s in samples)]
    panel = 2.9  # inches
    row = 0.97 * panel * min(1.6, max(0.5, *(_proportion(s) for s in samples)))
    columns = len(names) + 1
    entries = _legend_entries(samples, classes)
    widest = 0.45 + 0.065 * max((len(f"{label} {name}") for label, name in entries), default=0)  # inches, about
    per_line = max(1, min(len(entries), int(columns * panel / widest)))
    legend = 0.2 * math.ceil(len(entries) / per_line) + 0.14
    heading = 0.28 + (0.24 if title else 0.0)
    from matplotlib.figure import Figure

    total = len(samples) * row + legend + heading
    figure = Figure(figsize=(columns * panel, total), dpi=DPI, facecolor="white")
    grid = figure.add_gridspec(
        len(samples), columns, left=0.035, right=0.995, bottom=legend / total, top=1 - heading / total,
        wspace=0.02, hspace=0.03,
    )  # fmt: skip
    for i, sample in enumerate(samples):
        for j, name in enumerate(("image", *names)):
            axes = figure.add_subplot(grid[i, j])
            labels = None if name == "image" else getattr(sample, name)
            _draw_panel(axes, sample, labels, blank=name != "image" and labels is None)
            if i == 0:
                axes.set_title(name, fontsize=11, pad=4)
            if j == 0 and sample.title:
                axes.set_ylabel(_literal(sample.title, int(row * PER_INCH)), fontsize=9, labelpad=4)
    if title:
        figure.suptitle(
            _literal(title, int(0.62 * columns * panel * PER_INCH)),
            fontsize=12,
            fontweight="bold",
            y=1 - 0.06 / total,
            va="top",
        )
    _draw_legend(figure, entries, per_line)
    _save(figure, path)


def save_curves(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write training loss against step and validation Dice against epoch as one picture.

    Args:
        path: PNG file, replaced in one step if it exists.
        rows: metrics in order. Those with `step` and `loss` make the loss curve; those with `epoch` and `dice` make the
            validation curve. Other keys are ignored, and values that are not finite, or beyond 1e30, are left out of
            the curves.
    """
    from matplotlib.figure import Figure

    losses = _points(rows, "step", "loss")
    dices = _points(rows, "epoch", "dice")
    figure = Figure(figsize=(9, 3.4), dpi=DPI, facecolor="white", layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_loss(left, losses)
    _draw_dice(right, dices)
    for axes in (left, right):
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def _points(rows: Sequence[Mapping[str, Any]], x: str, y: str) -> NDArray[np.float64]:
    """[n, 2] of the rows that hold `x` and `y` that can be drawn."""
    pairs = [(float(r[x]), float(r[y])) for r in rows if r.get(x) is not None and r.get(y) is not None]
    return np.array([p for p in pairs if all(abs(value) <= LARGEST for value in p)], dtype=np.float64).reshape(-1, 2)


def _smooth(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """A centred running mean over a twentieth of the points, narrower at both ends."""
    reach = len(values) // 40
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    half = np.minimum(reach, np.minimum(index, len(values) - 1 - index))
    return (total[index + half + 1] - total[index - half]) / (2 * half + 1)


def _draw_loss(axes: Axes, points: NDArray[np.float64]) -> None:
    axes.set_title("Training loss", fontsize=11)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    if not len(points):
        _say_empty(axes, "no step logged yet")
        return
    steps, values = points.T
    axes.plot(steps, values, color="#B5CFE3", linewidth=0.8, marker="." if len(points) == 1 else "", label="logged")
    axes.plot(steps, _smooth(values), color="#0072B2", linewidth=1.8, label="running mean")
    if values.min() > 0 and values.max() > 20 * values.min():
        axes.set_yscale("log")
    axes.legend(frameon=False, fontsize=9)


def _draw_dice(axes: Axes, points: NDArray[np.float64]) -> None:
    axes.set_title("Validation Dice", fontsize=11)
    axes.set_xlabel("epoch")
    axes.set_ylabel("mean foreground Dice")
    if not len(points):
        _say_empty(axes, "no validation yet")
        return
    from matplotlib.ticker import MaxNLocator

    epochs, values = points.T
    many = len(points) > 40
    axes.plot(epochs, values, color="#D55E00", linewidth=1.6, marker="" if many else "o", markersize=3.5)
    best = int(values.argmax())
    axes.plot(epochs[best], values[best], marker="*", markersize=13, color="black", linestyle="none")
    note = f"best {values[best]:.4f} (epoch {epochs[best]:g})"
    axes.text(0.98, 0.04, "\u2605 " + note, transform=axes.transAxes, ha="right", va="bottom", fontsize=9)
    axes.set_ylim(0, max(1.0, float(values.max())))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _say_empty(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color="0.4")
    axes.set_xticks([])
    axes.set_yticks([])


def _check_sample(name: str, sample: Sample, classes: int) -> None:
    shape = _canvas(sample.image).shape[:2]
    for part in ("truth", "prediction"):
        labels = getattr(sample, part)
        if labels is None:
            continue
        if labels.shape != shape:
            raise ValueError(f"{name}.{part}: got shape {labels.shape}, expected {shape} as the image has")
        if labels.size and not 0 <= labels.min() <= labels.max() < classes:
            span = f"{labels.min()} to {labels.max()}"
            raise ValueError(f"{name}.{part}: got labels {span}, expected 0 to {classes - 1}")


def _canvas(image: Image) -> NDArray[np.float64]:
    """[h, w, 3] RGB in 0..1."""
    image = np.nan_to_num(np.asarray(image, dtype=np.float64))
    if image.ndim == 2:
        image = image[None]
    if image.ndim != 3 or not image.size:
        raise ValueError(f"image: got shape {image.shape}, expected [h, w] or [C, h, w]")
    rgb = image if image.shape[0] == 3 else np.repeat(image[:1], 3, axis=0)
    return np.clip(np.moveaxis(rgb, 0, -1), 0, 1)


def _proportion(sample: Sample) -> float:
    """Height over width of a sample as it is drawn."""
    height, width = sample.image.shape[-2:]
    return height / width * sample.aspect


def _draw_panel(axes: Axes, sample: Sample, labels: Labels | None, blank: bool) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    if blank:
        _say_empty(axes, "not known")
        return
    canvas = _canvas(sample.image)
    if labels is not None:
        canvas = _tint(canvas, labels)
    axes.imshow(canvas, interpolation="nearest", aspect=sample.aspect)
    if labels is not None:
        _write_indices(axes, labels)


def _tint(canvas: NDArray[np.float64], labels: Labels) -> NDArray[np.float64]:
    """The canvas with each class filled half transparent and its border drawn solid."""
    from matplotlib.colors import to_rgb

    inside = np.ones(labels.shape, bool)  # pixels whose four neighbours bear the same label
    for axis in (0, 1):
        same = np.diff(labels.astype(np.int64), axis=axis) == 0
        pad = [(0, 0), (0, 0)]
        pad[axis] = (0, 1)
        inside &= np.pad(same, pad, constant_values=True)
        pad[axis] = (1, 0)
        inside &= np.pad(same, pad, constant_values=True)
    canvas = canvas.copy()
    for label in np.unique(labels[labels > 0]):
        region = labels == label
        rgb = np.array(to_rgb(colour(int(label))))
        canvas[region] = (1 - FILL) * canvas[region] + FILL * rgb
        canvas[region & ~inside] = rgb
    return canvas


def _write_indices(axes: Axes, labels: Labels) -> None:
    """The class index at the innermost pixel of each class, where the region has room for it."""
    from matplotlib.patheffects import withStroke
    from scipy import ndimage

    room = 0.02 * max(labels.shape)
    for label in np.unique(labels[labels > 0]):
        depth = ndimage.distance_transform_edt(np.pad(labels == label, 1))[1:-1, 1:-1]
        if depth.max() < room:
            continue
        y, x = np.unravel_index(int(depth.argmax()), depth.shape)
        axes.text(
            float(x), float(y), str(label), color="white", fontsize=8, fontweight="bold", ha="center", va="center",
            path_effects=[withStroke(linewidth=2, foreground="black")],
        )  # fmt: skip


def _legend_entries(samples: Sequence[Sample], classes: Sequence[str]) -> list[tuple[int, str]]:
    """Index of the classes that appear and name as it is drawn; all of them where the list is short."""
    names = [_literal(name, LONGEST_NAME) for name in classes]
    if len(classes) <= 11:
        return list(enumerate(names))[1:]
    maps = [m for s in samples for m in (s.truth, s.prediction) if m is not None]
    seen = {int(v) for m in maps for v in np.unique(m)}
    return [(i, n) for i, n in enumerate(names) if i > 0 and i in seen]


def _literal(text: str, longest: int) -> str:
    """A name as matplotlib draws it letter by letter, on one line, without its middle where it is too long.

    Dollars would begin a formula, and a letter that the font lacks a warning; it becomes a box.
    """
    text = escaped(text)
    if len(text) > longest:
        text = f"{text[: longest // 2]}\u2026{text[1 - longest + longest // 2 :]}"
    return "".join(letter if _drawable(letter) else "\u25a1" for letter in text).replace("$", r"\$")


@functools.cache
def _drawable(letter: str) -> bool:
    """Whether the fonts of titles and labels have the letter."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    fonts = (get_font(findfont(FontProperties(weight=weight))) for weight in ("normal", "bold"))
    return all(font.get_char_index(ord(letter)) for font in fonts)


def _draw_legend(figure: Figure, entries: Sequence[tuple[int, str]], per_line: int) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(facecolor=colour(i), edgecolor="black", linewidth=0.5, label=f"{i} {name}") for i, name in entries]
    if handles:
        figure.legend(
            handles=handles, loc="lower center", ncols=per_line, frameon=False, fontsize=9, handlelength=1.1,
            handleheight=1.0, columnspacing=1.2, borderaxespad=0.1,
        )  # fmt: skip


def _save(figure: Figure, path: str | Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    with disk_errors(path), atomic_file(path) as temporary:
        temporary.write_bytes(buffer.getvalue())
