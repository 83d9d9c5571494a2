"""The Markdown summary of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from . import budgets
from .rows import OK, PARITY_FAILED, Row, shape_text

_TITLES = {
    "operators": "Operators",
    "blocks": "The sixteen DMW-LA blocks",
    "context": "Context attention at the network's shapes",
    "dsgim": "DS-GIM",
    "loss": "The loss",
    "network": "The whole network, forward",
    "step": "The training step",
    "evaluation": "Evaluation of a volume",
    "data": "The data loader alone",
    "fast": "Fast mode (tiny sizes: structure and parity, the times mean nothing)",
    "asked": "Shapes asked for",
}
_NOTES = {
    "blocks": "`x n`: how many of the sixteen have this shape.",
    "step": "Parts are stretches of one step and add up to it; *other* is embeddings, gates, heads and the check of "
    "the gradients. `without_backbone` is the step less its backbone.",
    "evaluation": "`reference` is the definition on the full volume: four distance transforms a class.",
}
_NOTHING = "–"  # noqa: RUF001 - an en dash, as tables print an empty cell


def milliseconds(value: float | None) -> str:
    """Three digits that count."""
    return _NOTHING if value is None else f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def size(value: float | None, units: Sequence[str] = ("B", "kB", "MB", "GB", "TB")) -> str:
    """``12.3 MB``."""
    if value is None:
        return _NOTHING
    index = 0
    while value >= 1000 and index < len(units) - 1:
        value, index = value / 1000, index + 1
    return f"{value:.3g} {units[index]}"


def speedup(row: Row) -> str:
    """``2.1x (1.9 to 2.3)``, or ``2.1x (medians)``; the reason where there is none."""
    if row.speedup is None:
        return "parity failed" if row.parity == PARITY_FAILED else _NOTHING
    if row.speedup_p20 is None or row.speedup_p80 is None:
        return f"{row.speedup:.3g}x (medians)"
    return f"{row.speedup:.3g}x ({row.speedup_p20:.3g} to {row.speedup_p80:.3g})"


def environment_line(environment: dict[str, Any]) -> str:
    """The machine in one sentence."""
    where = environment.get("gpu") or f"{environment.get('cpu')}, {environment.get('threads')} threads"
    parts = [str(where)]
    if environment.get("gpu"):
        parts.append(f"driver {environment.get('driver')}, CUDA {environment.get('cuda')}")
    parts.append(f"torch {environment.get('torch')}")
    if environment.get("gpu"):
        parts.append(f"Triton {environment.get('triton')}")
    parts += [f"Python {environment.get('python')}", f"commit {environment.get('commit')}"]
    return ", ".join(parts)


def markdown(rows: Sequence[Row], pictures: Sequence[str] = ()) -> str:
    """The summary: machine, ceilings, what failed, and a table a group.

    Args:
        rows: of one run.
        pictures: file names to show.
    """
    if not rows:
        return "# Benchmark\n\nNothing was measured.\n"
    environment = rows[0].environment
    lines = ["# Benchmark", "", environment_line(environment), ""]
    rates = {k.removesuffix("_tflop_s"): v for k, v in environment.items() if k.endswith("_tflop_s")}
    if rates:
        products = ", ".join(f"{rate} TFLOP/s in {dtype}" for dtype, rate in rates.items())
        lines += [f"Measured ceilings: copy {environment.get('bandwidth_gb_s')} GB/s, products {products}.", ""]
    lines += [
        "Times are medians with 20th and 80th percentile. A speed-up is the median of the rounds' own ratios to the "
        "eager reference in the same run and dtype, shown only where parity of the same case passed in this run; one "
        "marked *(medians)* is the ratio to the reference of another run on this machine. Memory is what tensors take "
        "at the peak, above the inputs. Roofline: the time that bytes and operations by formula would take at the "
        "measured ceilings, over the time taken.",
        "",
    ]
    failed = [row for row in rows if row.status != OK or row.parity == PARITY_FAILED]
    lines += _failures(failed)
    lines += _budgets(rows)
    lines += [line for name in pictures for line in (f"![{name.removesuffix('.png')}]({name})", "")]
    groups = list(dict.fromkeys(row.group for row in rows))
    for group in groups:
        lines += _table(group, [row for row in rows if row.group == group])
    return "\n".join(lines)


def _budgets(rows: Sequence[Row]) -> list[str]:
    found = budgets.check(rows)
    if not found:
        return []
    lines = ["| budget | needed | measured | met |", "|---|---:|---:|---|"]
    lines += [f"| {b.what} | {b.needed} | {b.measured} | {'yes' if b.met else '**no**'} |" for b in found]
    return [*lines, ""]


def _failures(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return ["Every case ran, and every parity check passed.", ""]
    lines = ["**What did not work:**", ""]
    seen = set()
    for row in rows:
        what = row.status if row.status != OK else "parity failed"
        key = (row.operator.partition(".")[0], row.backend, row.dtype, shape_text(row.shape), what)
        if key not in seen:
            lines.append(f"- {key[0]} [{key[3]}] {row.dtype} {row.backend}: {what} ({row.message})")
            seen.add(key)
    return [*lines, ""]


def _table(group: str, rows: Sequence[Row]) -> list[str]:
    lines = [f"## {_TITLES.get(group, group[:1].upper() + group[1:])}", ""]
    if group in _NOTES:
        lines += [_NOTES[group], ""]
    columns = _columns(rows)
    lines.append("| " + " | ".join(columns) + " |")
    lines.append("|" + "|".join("---" if name in _TEXT else "---:" for name in columns) + "|")
    for row in rows:
        cells = _cells(row)
        lines.append("| " + " | ".join(cells[name] for name in columns) + " |")
    return [*lines, ""]


_TEXT = ("operator", "shape", "dtype", "direction", "backend", "parity")


def _columns(rows: Sequence[Row]) -> list[str]:
    """The columns that say something about these rows."""
    optional = {
        "dtype": any(row.dtype for row in rows),
        "memory": any(row.peak_bytes is not None for row in rows),
        "roofline": any(row.roofline_share is not None for row in rows),
        "items/s": any(row.rate is not None for row in rows),
        "launches": any(row.launches is not None for row in rows),
        "syncs": any(row.syncs is not None for row in rows),
    }
    order = [
        "operator", "shape", "dtype", "direction", "backend", "ms", "p20 to p80", "speed-up", "memory", "roofline",
        "items/s", "launches", "syncs", "parity",
    ]  # fmt: skip
    return [name for name in order if optional.get(name, True)]


def _cells(row: Row) -> dict[str, str]:
    uses = f" x {row.uses}" if row.uses > 1 else ""
    label = f"{row.label}{uses}: " if row.group in ("blocks", "dsgim") else ""
    spread = _NOTHING if row.p20_ms is None else f"{milliseconds(row.p20_ms)} to {milliseconds(row.p80_ms)}"
    share = _NOTHING
    if row.roofline_share is not None:
        share = f"{100 * row.roofline_share:.1f} % ({row.bound})"
    return {
        "operator": row.operator,
        "shape": label + shape_text(row.shape),
        "dtype": row.dtype,
        "direction": row.direction,
        "backend": row.backend,
        "ms": milliseconds(row.median_ms) if row.status == OK else row.status,
        "p20 to p80": spread,
        "speed-up": speedup(row),
        "memory": size(row.peak_bytes),
        "roofline": share,
        "items/s": _NOTHING if row.rate is None else f"{row.rate:.3g}",
        "launches": _NOTHING if row.launches is None else str(row.launches),
        "syncs": _NOTHING if row.syncs is None else str(row.syncs),
        "parity": row.parity,
    }


def summary(rows: Sequence[Row]) -> str:
    """What a terminal shows at the end: counts, and the speed-ups of the default directions."""
    failed = sum(row.status != OK for row in rows)
    wrong = sum(row.parity == PARITY_FAILED for row in rows)
    lines = [f"{len(rows)} rows, {failed} without a time, {wrong} with failed parity"]
    shown = [row for row in rows if row.speedup is not None and row.direction != "backward"]
    forward_only = {row.case_key[:2] for row in shown} - {row.case_key[:2] for row in shown if row.direction == "both"}
    shown = [row for row in shown if row.direction == "both" or row.case_key[:2] in forward_only]
    width = max((len(row.operator) for row in shown), default=0)
    for row in shown:
        lines.append(
            f"{row.operator:{width}}  {row.backend:18} {row.dtype:9} {speedup(row):26} {shape_text(row.shape)}"
        )
    return "\n".join(lines)
