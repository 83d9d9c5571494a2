"""Two results side by side: result files, or two revisions of the package measured in turns by this benchmark.

A difference counts only if the ranges from the 20th to the 80th percentile do not meet: else it is noise.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from simmp_fast.config import ConfigError

from . import timing
from .environment import ROOT, git
from .report import environment_line, milliseconds, size
from .rows import OK, RESULTS, Row, read_jsonl, shape_text

NOISE, FASTER, SLOWER = "noise", "faster", "slower"
TURNS = 2  # A B A B: a slow change of the machine meets both revisions


@dataclass(frozen=True)
class Difference:
    """A measurement that both results hold.

    Attributes:
        before, after: the two rows.
        ratio: time before over time after, above 1 where `after` is faster; None where one has no time.
        low, high: the range that the percentiles of both allow for it.
        verdict: "noise", "faster", "slower", or what became of a row without a time.
    """

    before: Row
    after: Row
    ratio: float | None
    low: float | None
    high: float | None
    verdict: str


def difference(before: Row, after: Row) -> Difference:
    """Compare two rows of equal key."""
    times = (before.p20_ms, before.median_ms, before.p80_ms, after.p20_ms, after.median_ms, after.p80_ms)
    if any(time is None for time in times):
        verdict = after.status if before.status == OK else f"{before.status} before, {after.status} after"
        return Difference(before, after, None, None, None, verdict)
    a20, a50, a80, b20, b50, b80 = (float(time) for time in times if time is not None)
    low, high = a20 / b80, a80 / b20
    verdict = NOISE if low <= 1 <= high else FASTER if low > 1 else SLOWER
    return Difference(before, after, a50 / b50, low, high, verdict)


def differences(before: Sequence[Row], after: Sequence[Row]) -> list[Difference]:
    """Every measurement that both results hold, in the order of the first.

    Raises:
        ConfigError: they have none in common.
    """
    others = {row.key: row for row in after}
    found = [difference(row, others[row.key]) for row in before if row.key in others]
    if not found:
        raise ConfigError("--compare: the two results have no measurement in common")
    return found


def markdown(names: tuple[str, str], before: Sequence[Row], after: Sequence[Row]) -> str:
    """The comparison as a table, with a count of each verdict."""
    found = differences(before, after)
    a, b = names
    counts = {verdict: sum(d.verdict == verdict for d in found) for verdict in (FASTER, SLOWER, NOISE)}
    lines = [f"# {a} against {b}", "", f"- {a}: {environment_line(before[0].environment)}"]
    lines.append(f"- {b}: {environment_line(after[0].environment)}")
    alone = len({r.key for r in before} ^ {r.key for r in after})
    lines += ["", f"Of {len(found)} measurements {counts[FASTER]} became faster, {counts[SLOWER]} slower, and "]
    lines[-1] += f"{counts[NOISE]} differ by no more than noise: their ranges (p20 to p80) meet. "
    lines[-1] += f"{alone} are in one of the results only."
    first, second = before[0].environment, after[0].environment
    changed = [k for k in ("cpu", "gpu", "threads", "torch", "triton") if first.get(k) != second.get(k)]
    if changed:
        lines += ["", f"**The machines differ ({', '.join(changed)}): the ratios compare those as well.**"]
    lines += [
        "",
        f"| operator | shape | dtype | direction | backend | ms {a} | ms {b} | ratio | range | memory | verdict |",
    ]
    lines.append("|---|---|---|---|---|---:|---:|---:|---:|---:|---|")
    lines += [_line(d) for d in found]
    return "\n".join(lines) + "\n"


def _line(d: Difference) -> str:
    row = d.before
    ratio = "–" if d.ratio is None else f"{d.ratio:.3g}x"  # noqa: RUF001 - an empty cell
    spread = "–" if d.low is None or d.high is None else f"{d.low:.3g} to {d.high:.3g}"  # noqa: RUF001
    memory = size(d.before.peak_bytes)
    if d.after.peak_bytes != d.before.peak_bytes:
        memory += f" to {size(d.after.peak_bytes)}"
    cells = [
        row.operator, shape_text(row.shape), row.dtype, row.direction, row.backend, milliseconds(row.median_ms),
        milliseconds(d.after.median_ms), ratio, spread, memory, d.verdict,
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def compare(names: tuple[str, str], selection: Mapping[str, Any], progress: Callable[[str], None]) -> str:
    """The comparison of two result files, or of two revisions.

    Args:
        names: two paths, or two names that git knows.
        selection: options of the benchmark that say what is measured, for revisions.
        progress: called with what is being done.

    Raises:
        ConfigError: neither files nor revisions, or results without anything in common.
    """
    paths = [Path(name) for name in names]
    if all(path.exists() for path in paths):
        return markdown(names, read_jsonl(paths[0]), read_jsonl(paths[1]))
    commits = [_commit(name) for name in names]
    rows: list[list[Row]] = [[], []]
    with tempfile.TemporaryDirectory() as folder:
        trees = [_unpack(commit, Path(folder) / f"revision{i}") for i, commit in enumerate(commits)]
        for turn in range(TURNS):
            for i, tree in enumerate(trees):
                progress(f"{names[i]} ({turn + 1} of {TURNS})")
                found = _measure(tree, commits[i], selection, Path(folder) / "out")
                rows[i] = merge(rows[i], found) if rows[i] else found
    return markdown(names, *rows)


def _commit(name: str) -> str:
    """The commit that `name` stands for."""
    commit = git("rev-parse", "--verify", "--quiet", f"{name}^{{commit}}")
    if not commit:
        raise ConfigError(f"--compare: got {name!r}, expected a result file, its folder, or a revision of this clone")
    return commit


def _unpack(commit: str, folder: Path) -> Path:
    """The package as it was at a commit; the clone itself is left alone."""
    command = ["git", "-C", str(ROOT), "archive", "--format=tar", commit, "--", "simmp_fast"]
    result = subprocess.run(command, capture_output=True, check=False)
    if result.returncode != 0:
        reason = result.stderr.decode(errors="replace").strip().splitlines()
        raise ConfigError(f"--compare: {commit[:12]} holds no simmp_fast ({reason[-1] if reason else 'git failed'})")
    folder.mkdir()
    with tarfile.open(fileobj=BytesIO(result.stdout)) as archive:
        archive.extractall(folder, filter="data")
    return folder


def _measure(tree: Path, commit: str, selection: Mapping[str, Any], out: Path) -> list[Row]:
    """The rows of this clone's benchmark on another revision's package, in a process of its own."""
    code = "import sys; from bench.command import measure_selection; measure_selection(*sys.argv[1:])"
    command = [sys.executable, "-c", code, json.dumps(selection), str(out)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(tree), str(ROOT)))}
    result = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        last = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise ConfigError(f"--compare: revision {commit[:12]} cannot be measured by this benchmark: {last}")
    rows = read_jsonl(out / RESULTS)
    for row in rows:
        row.environment["commit"] = commit[:12]
    return rows


def merge(first: Sequence[Row], second: Sequence[Row]) -> list[Row]:
    """Rows with the rounds of both runs."""
    others = {row.key: row for row in second}
    for row in first:
        other = others.get(row.key)
        if other is not None and row.samples_ms and other.samples_ms:
            row.samples_ms = row.samples_ms + other.samples_ms
            row.p20_ms, row.median_ms, row.p80_ms = timing.quantiles(row.samples_ms)
    return list(first)
