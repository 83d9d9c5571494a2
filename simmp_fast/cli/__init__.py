"""The command line: ``simmp-fast <command>``, one file a command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from simmp_fast import __version__
from simmp_fast.cli import bench, convert, demo, evaluate, info, predict, prepare, train

COMMANDS = (prepare, train, evaluate, predict, convert, info, demo, bench)


def build_parser() -> argparse.ArgumentParser:
    """The parser with all commands."""
    parser = argparse.ArgumentParser(
        prog="simmp-fast",
        description="Sim-MPNet for medical image segmentation: prepare data, train, evaluate, predict.",
        epilog="simmp-fast COMMAND --help says more about each, with an example.",
    )
    parser.add_argument("--version", action="version", version=f"simmp-fast {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")
    for module in COMMANDS:
        module.register(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 if it worked, 1 if training stopped on an error, 2 for input that cannot be used."""
    arguments = build_parser().parse_args(argv)
    try:
        return int(arguments.run(arguments) or 0)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        status = _exit_status(error)
        if status is None:
            raise
        print(f"simmp-fast {arguments.command}: {error}", file=sys.stderr)
        return status


def _exit_status(error: Exception) -> int | None:
    """The exit status of an error that its message explains; None for one that needs its traceback."""
    from simmp_fast.config import ConfigError
    from simmp_fast.data.errors import DataError
    from simmp_fast.ops import BackendError
    from simmp_fast.training.errors import TrainingError

    if isinstance(error, (ConfigError, DataError, BackendError)):
        return 2
    return 1 if isinstance(error, TrainingError) else None
