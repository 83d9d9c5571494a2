"""``simmp-fast evaluate``: metrics of a trained network on a split of a cache."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simmp_fast.cli.common import (
    RECIPE,
    add_command,
    add_model_options,
    choose_device,
    class_names,
    find_weights,
    known_recipe,
    load_network,
)

if TYPE_CHECKING:
    from simmp_fast.data import Cache

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
    parser.add_argument("--overwrite", action="store_true", help="replace results of other data that are in --out")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Evaluate, write CSV and JSON, print the table."""
    from simmp_fast.data import Cache
    from simmp_fast.evaluation.evaluate import evaluate
    from simmp_fast.evaluation.report import check_folder, check_results
    from simmp_fast.files import sha256

    device = choose_device(arguments.device)
    cache = Cache.open(arguments.data, verify=True)
    weights = find_weights(arguments.model)
    check_data(cache, weights)
    folder = arguments.out or weights.parent / "evaluation"
    check_folder(folder)
    measured = None if arguments.overwrite else check_results(folder, arguments.split, arguments.protocol, cache)
    model, _ = load_network(arguments.model, arguments.backend)
    result = evaluate(
        model,
        cache,
        arguments.split,
        protocol=arguments.protocol,
        batch_size=arguments.batch_size,
        device=device,
        precision=arguments.precision,
        mirror=arguments.mirror,
        progress=True,
    )
    identity = {"file": weights.name, "sha256": sha256(weights)}
    try:
        saved = replace(result, weights=identity).save(folder, overwrite=arguments.overwrite)
    finally:
        print(result.table())  # whether or not it could be saved
    if measured is not None and measured != identity:
        print(
            f"{saved[0]}, {saved[1].name}: replaced results of other weights ({measured.get('file')})", file=sys.stderr
        )
    for path in saved:
        print(path)


def check_data(cache: Cache, weights: Path) -> None:
    """Compare a cache with what is known of the data that a network was trained on.

    That is the recipe beside the weights or in them, or else the class names in them, or nothing; the last two are said
    on standard error. Numbers of classes and channels and the image size are compared with the network later.

    Raises:
        DataError: lists what differs.
        ConfigError: the recipe or the weights cannot be read.
    """
    from simmp_fast.evaluation.evaluate import check_class_names, check_prepared_alike

    recipe, path = known_recipe(weights), weights.parent / RECIPE
    if recipe is not None:
        check_prepared_alike(recipe, cache, path if path.exists() else weights)
        return
    names = class_names(weights)
    if names is not None:
        check_class_names(names, cache, weights)
    unknown = "intensity rule and slice axis" if names else "class names, intensity rule and slice axis"
    print(f"{path}: no such file, so {unknown} of the data are not compared with the network's", file=sys.stderr)
