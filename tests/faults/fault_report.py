"""The results as tables: for a terminal, and in docs/reliability.md."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path

import torch
from fault_calls import ACTIONS, TESTS
from fault_harness import Result
from fault_scenarios import SCENARIOS

DOCUMENT = TESTS.parent / "docs" / "reliability.md"
START, END = "<!-- results: written by python tests/faults -->", "<!-- end of the results -->"
STATES = ("old", "new", "mixed", "resumed", "lost")
COLUMNS = ("scenario", *ACTIONS, *STATES)


def table(results: Sequence[Result]) -> str:
    """A line for each scenario and action."""
    lines = [f"{'scenario':29}{'action':8}{'calls':>6}{'taken':>6}" + "".join(f"{state:>9}" for state in STATES)]
    for result in results:
        counts = "".join(f"{result.states[state] or '':>9}" for state in STATES)
        lines.append(f"{result.scenario:29}{result.action:8}{result.calls:>6}{result.attempts:>6}{counts}")
    return "\n".join(lines)


def write_document(results: Sequence[Result], path: Path = DOCUMENT) -> None:
    """Replace the rows of the scenarios whose actions were all taken, between the two marker lines."""
    text = path.read_text(encoding="utf-8")
    before, rest = text.split(START)
    inside, after = rest.split(END)
    cells = (tuple(cell.strip() for cell in line.strip("|").split("|")) for line in inside.splitlines())
    rows = {row[0]: row for row in cells if row[0] in SCENARIOS and len(row) == len(COLUMNS)}
    for name, kind in SCENARIOS.items():
        own = {result.action: result for result in results if result.scenario == name}
        if own.keys() == set(kind.actions):
            rows[name] = _row(name, own)
    ordered = [COLUMNS, tuple("---" for _ in COLUMNS), *(rows[name] for name in SCENARIOS if name in rows)]
    system = (
        f"{platform.system()} {platform.machine()}, Python {platform.python_version()}, PyTorch {torch.__version__}"
    )
    body = "\n".join("| " + " | ".join(row) + " |" for row in ordered)
    path.write_text(f"{before}{START}\n\n{body}\n\n{system}.\n\n{END}{after}", encoding="utf-8")


def _row(name: str, own: dict[str, Result]) -> tuple[str, ...]:
    """Calls taken by action (with those there are, where not all were), and how often each state was found."""
    taken = []
    for action in ACTIONS:
        result = own.get(action)
        if result is None:
            taken.append("")
        else:
            all_taken = result.attempts == result.calls
            taken.append(str(result.calls) if all_taken else f"{result.attempts} of {result.calls}")
    totals = [str(sum(result.states[state] for result in own.values())) for state in STATES]
    return (name, *taken, *totals)
