"""``simmp-fast bench``: how fast the operators and the network are here. The benchmark itself comes with a clone."""

from __future__ import annotations

import argparse
import importlib
import math
import sys
from pathlib import Path
from typing import Any

from simmp_fast.bounds import TRAIN_LIMITS
from simmp_fast.cli.common import add_command
from simmp_fast.config import ConfigError
from simmp_fast.messages import shown

CLONE = Path(__file__).resolve().parents[2]
_LONGEST = 86_400  # seconds for one case: a day

_EXAMPLE = """simmp-fast bench --out results
  simmp-fast bench context_attention powerset_loss --dtype bfloat16
  simmp-fast bench memory_attention --shape N=784,D=128 N=784,M=400 --backend portable
  simmp-fast bench context_attention --compare HEAD~1 HEAD

a speed-up is shown only where parity of the same case passed in the same run; docs/benchmark.md explains the numbers"""


def register(commands: Any) -> None:
    """Add the command."""
    parser = add_command(commands, "bench", "measure operators and network on this machine, parity beside", _EXAMPLE)
    add_options(parser)
    parser.set_defaults(run=run)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The benchmark's options."""
    add = parser.add_argument
    add("operator", nargs="*", help="what to measure, such as context_attention or training_step (default: all)")
    add(
        "--backend",
        nargs="+",
        metavar="NAME",
        help="reference, portable, sdpa, triton, triton-fast, ..: docs/benchmark.md has all (default: those that run "
        "here without long compilation)",
    )
    add("--shape", nargs="+", metavar="SIZES", help="sizes by name, such as N=784,D=128, for the operators named")
    add(
        "--dtype",
        nargs="+",
        metavar="NAME",
        help="float32, bfloat16, float16 (default: float32; on a GPU bfloat16 too)",
    )
    add("--out", type=Path, help="folder for rows, report and pictures (default: bench-results)")
    add("--group", nargs="+", metavar="NAME", help="such as operators, blocks, loss, 'sweep N', step")
    add("--direction", nargs="+", choices=("forward", "backward", "both"), help="rows to keep (default: all)")
    add("--batch", type=_batch, help="images (default: 20 on a GPU, 1 on a CPU)")
    add("--device", help="such as cpu or cuda:0 (default: a GPU if there is one)")
    add("--seconds", type=_seconds, help="time for one case and dtype, beyond its warm-up and parity (default: 2)")
    add("--fast", action="store_true", help="tiny shapes: structure and parity in under two minutes, no figures")
    add("--no-baseline", action="store_true", help="the reference only if --backend names it; --merge adds speed-ups")
    add("--all", action="store_true", help="the fine sweeps on a CPU too")
    add("--list", action="store_true", help="print the cases and measure nothing")
    add("--compare", nargs=2, metavar=("A", "B"), help="two result files, or two revisions of this clone")
    add("--merge", nargs="+", type=Path, metavar="DIR", help="make one report, in --out, of results of one machine")


def _batch(text: str) -> int:
    return int(_at_most(text, int, TRAIN_LIMITS["batch_size"][0]))


def _seconds(text: str) -> float:
    return _at_most(text, float, _LONGEST)


def _at_most(text: str, kind: type[int] | type[float], most: float) -> float:
    try:
        number = kind(text)
    except ValueError:
        number = math.nan
    if not number <= most:  # NaN is not
        what = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"got {shown(text)}, expected {what} of at most {most}")
    return number


def run(arguments: argparse.Namespace) -> None:
    """Measure, write rows, report and pictures, and print a summary; or list the cases; or compare or merge results."""
    if not (CLONE / "bench" / "__init__.py").is_file():
        raise ConfigError(
            "the benchmark is not part of an installed package, it needs a clone of the repository: there, "
            "pip install -e . and run simmp-fast bench, or PYTHONPATH=. python -m simmp_fast.cli bench"
        )
    if str(CLONE) not in sys.path:
        sys.path.insert(0, str(CLONE))
    importlib.import_module("bench.command").execute(arguments)
