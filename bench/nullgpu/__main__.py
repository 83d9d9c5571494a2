"""`python -m bench.nullgpu [--capability 9.0] [--plays "NVIDIA H200"] COMMAND ...`: run a command on the null GPU."""

from __future__ import annotations

import argparse
import sys

from . import NullGPUError, run


def main() -> int:
    """The command; returns 2 for what cannot be run, else becomes it."""
    parser = argparse.ArgumentParser(prog="python -m bench.nullgpu", description="run a command on the null GPU")
    parser.add_argument("--capability", default="9.0", help="such as 8.6 (default: 9.0)")
    parser.add_argument("--plays", metavar="NAME", help="a GPU by its name, to make Inductor's graphs for it")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="and its arguments")
    options = parser.parse_args()
    if not options.command:
        parser.error("COMMAND: got none")
    try:
        major, minor = map(int, options.capability.split("."))
        run(options.command, (major, minor), options.plays)
    except (NullGPUError, OSError, ValueError) as error:
        print(error, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
