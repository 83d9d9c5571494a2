"""``simmp-fast evaluate``: metrics of a trained network on a split of a cache."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from simmp_fast.cli.common import add_command, add_model_options, choose_device, load_network

_EXAMPLE = """simmp-fast evaluate runs/demo --data cache/demo --split test --protocol strict

protocols:
  published  the convention of the published tables: voxel units, fixed values for empty masks
  strict     millimetres (voxels where the files state no spacing); a class absent from both masks is left out,
             undefined distances are counted"""


def register(commands: Any) -> None:
    """Add the command."""
    parser = add_command(commands, "evaluate", "measure a trained network on held-out cases", _EXAMPLE)
    add_model_options(parser)
    parser.add_argument("--data", type=Path, required=True, help="a cache that prepare wrote")
    parser.add_argument("--split", default="test", help="train, validation or test")
    parser.add_argument("--protocol", choices=("published", "strict"), default="published", help="see below")
    parser.add_argument("--out", type=Path, help="folder for CSV and JSON (default: evaluation beside the weights)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Evaluate, print the table, write CSV and JSON."""
    from simmp_fast.data import Cache
    from simmp_fast.evaluation.evaluate import evaluate

    cache = Cache.open(arguments.data)
    model, weights = load_network(arguments.model, arguments.backend)
    result = evaluate(
        model,
        cache,
        arguments.split,
        protocol=arguments.protocol,
        batch_size=arguments.batch_size,
        device=choose_device(arguments.device),
        precision=arguments.precision,
        mirror=arguments.mirror,
        progress=True,
    )
    print(result.table())
    for path in result.save(arguments.out or weights.parent / "evaluation"):
        print(path)
