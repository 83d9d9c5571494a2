"""The pictures of a run: cost and memory against N, the training step by part, the roofline.

A backend has one colour, one marker and one line style everywhere; the colours differ in lightness and the parts of the
step in hatching too, so that all of them survive a greyscale print. Sizes are those of a README's column.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cases import PARTS
from .report import environment_line
from .rows import OK, PASSED, Row, write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, DPI = 8.2, 110

# Colour (rising lightness), marker, line style.
STYLES = {
    "reference": ("#222222", "o", "-"),
    "reference-compiled": ("#7A4B1E", "s", "--"),
    "portable": ("#0072B2", "^", "-"),
    "portable-compiled": ("#56B4E9", "v", "--"),
    "sdpa": ("#8F8F8F", "D", ":"),
    "sdpa-flash": ("#A8A8A8", "<", ":"),
    "sdpa-cudnn": ("#C4C4C4", ">", ":"),
    "triton": ("#E69F00", "P", "-"),
    "triton-compiled": ("#C77700", "X", "--"),
    "triton-channels-last": ("#EDB95E", "p", "--"),
    "triton-graph": ("#F0D9A8", "h", "--"),
    "triton-fast": ("#9A3F00", "*", "-"),
}
# Colour and hatch, dark and light in turn.
PART_STYLES = {
    "backbone": ("#3B3B3B", ""),
    "dmwla": ("#E69F00", ""),
    "dsgim": ("#0072B2", "//"),
    "decoder": ("#B8D8EA", ""),
    "loss": ("#8C3B2E", "xx"),
    "memory_update": ("#F3E2A0", ".."),
    "optimiser": ("#5A7D5A", ""),
    "other": ("#E4E4E4", "\\\\"),
}
_PART_NAMES = {"dmwla": "DMW-LA", "dsgim": "DS-GIM", "memory_update": "memory update"}


def save_all(folder: Path, rows: Sequence[Row]) -> list[Path]:
    """Draw every picture that the rows have something for; returns the files, none where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return []
    pictures: dict[str, Callable[[Sequence[Row]], Figure | None]] = {
        "cost_against_n.png": cost_against_n,
        "memory_against_n.png": memory_against_n,
        "step_by_part.png": step_by_part,
        "roofline.png": roofline,
    }
    written = []
    for name, draw in pictures.items():
        figure = draw([row for row in rows if row.status == OK])
        if figure is not None:
            _save(figure, folder / name)
            written.append(folder / name)
    return written


def _save(figure: Figure, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    write(path, buffer.getvalue())


def _figure(height: float, columns: int = 1, environment: dict[str, Any] | None = None) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    axes = list(figure.subplots(1, columns, squeeze=False)[0])
    for panel in axes:
        panel.grid(True, which="major", color="#DDDDDD", linewidth=0.6)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=9)
    if environment:
        figure.supxlabel(environment_line(environment), fontsize=7, color="#555555")
    return figure, axes


def _style(backend: str) -> dict[str, Any]:
    colour, marker, line = STYLES[backend]
    return {"color": colour, "marker": marker, "linestyle": line, "linewidth": 1.6, "markersize": 5.5}


def _against_n(rows: Sequence[Row], value: str, label: str, title: str) -> Figure | None:
    swept = [row for row in rows if row.group == "sweep N" and getattr(row, value) is not None]
    swept = [row for row in swept if row.direction == ("both" if _has_backward(row, swept) else "forward")]
    # One dtype to a picture: the fastest that was measured.
    dtype = next((d for d in ("bfloat16", "float16", "float32") if any(row.dtype == d for row in swept)), None)
    swept = [row for row in swept if row.dtype == dtype]
    operators = list(dict.fromkeys(row.operator for row in swept))[:4]
    if not operators:
        return None
    figure, axes = _figure(3.5, len(operators), swept[0].environment)
    for panel, operator in zip(axes, operators, strict=True):
        mine = [row for row in swept if row.operator == operator]
        for backend in [name for name in STYLES if any(row.backend == name for row in mine)]:
            line = sorted((row.shape["N"], getattr(row, value)) for row in mine if row.backend == backend)
            panel.plot(*zip(*line, strict=True), label=backend, **_style(backend))
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        ticks = sorted({row.shape["N"] for row in mine})
        panel.set_xticks(ticks, [f"{n:,}" for n in ticks], rotation=45 if len(ticks) > 4 else 0)
        panel.minorticks_off()
        _few_decades(panel)
        suffix = "" if mine[0].direction == "forward" else ", forward + backward"
        panel.set_title(f"{operator}{suffix if len(operators) < 3 else ''}", fontsize=10)
        panel.set_xlabel("tokens N", fontsize=9)
    axes[0].set_ylabel(label, fontsize=9)
    names, handles = _legend_of(axes)
    _head(figure, handles, f"{title}, batch {swept[0].shape['B']}, {dtype}", len(names))
    return figure


def _few_decades(panel: Axes) -> None:
    """Ticks at 1, 2 and 5 where a logarithmic axis spans too little for its powers of ten to say where it is."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    low, high = panel.get_ylim()
    if high < 100 * low:
        panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}" if value < 1e4 else f"{value:.0e}"))


def _head(figure: Figure, handles: list[Any], title: str, columns: int) -> None:
    """Title and legend above the panels; one box, so that they cannot meet."""
    figure.legend(
        handles=handles, title=title, title_fontsize=11, loc="outside upper center", ncols=columns, frameon=False,
        fontsize=9,
    )  # fmt: skip


def _legend_of(axes: Sequence[Axes]) -> tuple[list[str], list[Any]]:
    found: dict[str, Any] = {}
    for panel in axes:
        for handle, name in zip(*panel.get_legend_handles_labels(), strict=True):
            found.setdefault(name, handle)
    return list(found), list(found.values())


def _has_backward(row: Row, rows: Sequence[Row]) -> bool:
    return any(other.operator == row.operator and other.direction == "both" for other in rows)


def cost_against_n(rows: Sequence[Row]) -> Figure | None:
    """Milliseconds against the number of tokens, both axes logarithmic."""
    return _against_n(rows, "median_ms", "milliseconds", "Cost against N (lower is better)")


def memory_against_n(rows: Sequence[Row]) -> Figure | None:
    """Peak bytes against the number of tokens, both axes logarithmic."""
    return _against_n(rows, "peak_bytes", "bytes above the inputs", "Peak memory against N (lower is better)")


def step_by_part(rows: Sequence[Row]) -> Figure | None:
    """The training step as stacked bars, one for each backend and dtype."""
    from matplotlib.patches import Patch

    mine = [row for row in rows if row.operator.startswith("training_step.") and row.median_ms is not None]
    bars = list(dict.fromkeys((row.backend, row.dtype) for row in mine))
    if not bars:
        return None
    figure, (panel,) = _figure(1.6 + 0.55 * len(bars), 1, mine[0].environment)
    panel.grid(False, axis="y")
    longest = 0.0
    for place, bar in enumerate(bars):
        times = {
            row.operator.partition(".")[2]: row.median_ms or 0.0 for row in mine if (row.backend, row.dtype) == bar
        }
        left = 0.0
        for part in PARTS:
            colour, hatch = PART_STYLES[part]
            look: dict[str, Any] = {"color": colour, "hatch": hatch, "edgecolor": "black", "linewidth": 0.6}
            panel.barh(place, times.get(part, 0.0), left=left, height=0.62, **look)
            left += times.get(part, 0.0)
        panel.text(left, place, f"  {left:.3g} ms" if left < 1000 else f"  {left:,.0f} ms", va="center", fontsize=9)
        longest = max(longest, left)
    panel.set_yticks(range(len(bars)), [f"{backend}\n{dtype}" for backend, dtype in bars], fontsize=9)
    panel.set_ylim(len(bars) - 0.5, -0.5)
    panel.set_xlim(0, 1.16 * longest)
    panel.set_xlabel("milliseconds of one training step", fontsize=9)
    handles = [
        Patch(facecolor=c, hatch=h, edgecolor="black", linewidth=0.6, label=_PART_NAMES.get(part, part))
        for part, (c, h) in PART_STYLES.items()
    ]
    shape = mine[0].shape
    _head(figure, handles, f"The training step by part, batch {shape['B']}, {shape['side']} x {shape['side']}", 4)
    return figure


def roofline(rows: Sequence[Row]) -> Figure | None:
    """Each operator at its intensity (operations a byte) and the rate it reaches, under the measured ceilings."""
    mine = [
        row for row in rows if row.group in ("operators", "loss", "dsgim", "fast") or row.label == "encoder stage 1"
    ]
    mine = [row for row in mine if row.bytes and row.flops and row.median_ms and row.direction != "backward"]
    mine = [row for row in mine if row.parity == PASSED and not row.operator.startswith(("network", "training"))]
    mine = [row for row in mine if row.direction == ("both" if _has_backward(row, mine) else "forward")]
    if not mine or "bandwidth_gb_s" not in mine[0].environment:
        return None
    environment = mine[0].environment
    figure, (panel,) = _figure(4.9, 1, environment)
    bandwidth = 1e9 * environment["bandwidth_gb_s"]
    intensity = {id(row): (row.flops or 0) / (row.bytes or 1) for row in mine}
    low, high = min(intensity.values()) / 2, max(intensity.values()) * 6
    dtypes = sorted({row.dtype for row in mine})
    for dtype, line in zip(dtypes, ("-", "--", ":"), strict=False):
        top = 1e12 * environment[f"{dtype}_tflop_s"]
        knee = top / bandwidth
        points = sorted({low, min(max(knee, low), high), high})
        panel.plot(
            points, [min(top, bandwidth * x) / 1e9 for x in points], color="black", linestyle=line, linewidth=1.4
        )
        panel.text(max(knee, low) * 1.1, top / 1e9 * 1.08, f"{dtype} products", va="bottom", fontsize=8)
    filled = dict(zip(dtypes, ("full", "none", "left"), strict=False))
    for row in mine:
        style = _style(row.backend) | {"linestyle": "none", "markersize": 7, "fillstyle": filled[row.dtype]}
        rate = (row.flops or 0) / (row.median_ms or 1) * 1e3 / 1e9
        panel.plot([intensity[id(row)]], [rate], label=row.backend, **style)
    _name_operators(panel, mine, intensity)
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_xlim(low, high)
    panel.set_xlabel("operations a byte, by formula", fontsize=9)
    panel.set_ylabel("GFLOP/s", fontsize=9)
    names, handles = _legend_of([panel])
    _head(figure, handles, "Operators under the measured ceilings (higher is better)", len(names))
    return figure


def _name_operators(panel: Axes, rows: Sequence[Row], intensity: dict[int, float]) -> None:
    """The operator's name above the best of its points, or below the worst where another name is near."""
    points: dict[tuple[str, float], list[float]] = {}
    for row in rows:
        rate = (row.flops or 0) / (row.median_ms or 1) * 1e3 / 1e9
        points.setdefault((row.operator, intensity[id(row)]), []).append(rate)
    taken: list[tuple[float, float]] = []
    for (name, x), rates in sorted(points.items(), key=lambda item: -max(item[1])):
        above = all(abs(math.log10(x / a)) > 0.7 or abs(math.log10(max(rates) / b)) > 0.25 for a, b in taken)
        y, offset = (max(rates), 7) if above else (min(rates), -14)
        taken.append((x, y))
        panel.annotate(
            name, (x, y), xytext=(0, offset), textcoords="offset points", fontsize=7.5, ha="center", color="#333333"
        )
