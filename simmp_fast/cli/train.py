"""``simmp-fast train``: from a cache to a run folder."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simmp_fast.cli.common import add_command, choose_device
from simmp_fast.config import (
    BACKENDS,
    Config,
    from_mapping,
    merge,
    parse_override,
    preset,
    read_yaml,
    to_mapping,
)
from simmp_fast.console import Console

if TYPE_CHECKING:
    from simmp_fast.data import Cache

_EXAMPLE = """simmp-fast train --data cache/demo --run runs/demo --preset small
  simmp-fast train --data cache/my_data --run runs/mine --preset synapse --set train.batch_size=8 train.lr=3e-4
  simmp-fast train --data cache/my_data --run runs/mine --resume
  simmp-fast train --data cache/my_data --run runs/mine --resume previous
  torchrun --nproc-per-node 2 -m simmp_fast.cli train --data cache/my_data --run-folder runs/mine

the configuration is, later ones winning: the preset; classes, clusters, channels and image size of the data; the YAML
file of --config; --backend; the values of --set. It is saved as config.yaml in the run folder."""


def register(commands: Any) -> None:
    """Add the command."""
    parser = add_command(commands, "train", "train a network, or continue an interrupted run exactly", _EXAMPLE)
    parser.add_argument("--data", type=Path, required=True, help="a cache that prepare wrote")
    # torchrun, which reads the command line first, has options that begin with --run.
    parser.add_argument("--run", "--run-folder", dest="folder", type=Path, required=True, help="the run folder")
    parser.add_argument("--preset", default="synapse", help="acdc, isic2018, segpc2021, small or synapse")
    parser.add_argument("--config", type=Path, help="YAML file with the sections model and train")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="such as train.epochs=50")
    parser.add_argument("--backend", choices=BACKENDS, help="operator backend (default: as configured)")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="last",
        default=False,
        choices=("last", "previous"),
        help="continue the run in the folder, with its configuration, from its last checkpoint (also without a word) "
        "or from the one before that, which a run that diverged goes back to",
    )
    parser.add_argument("--device", default=None, help="such as cpu or cuda:0 (default: a GPU if there is one)")
    parser.set_defaults(run=run)


def configuration(arguments: argparse.Namespace, cache: Cache) -> Config:
    """The run's configuration: that of the saved run, or preset and data, then file and overrides."""
    from simmp_fast.training.run_folder import saved_config

    base = saved_config(arguments.folder, arguments.resume) if arguments.resume else None
    if base is None:
        from_data = {
            "classes": len(cache.classes),
            "clusters": len(cache.classes),
            "in_channels": cache.channels,
            "image_size": cache.image_size,
        }
        base = merge(to_mapping(preset(arguments.preset)), {"model": from_data})
    layers = [read_yaml(arguments.config)] if arguments.config else []
    layers += [{"train": {"backend": arguments.backend}}] if arguments.backend else []
    layers += [parse_override(text) for text in arguments.set]
    return from_mapping(Config, merge(base, *layers))


def run(arguments: argparse.Namespace) -> int:
    """Train; 130 where a signal stopped it, which `--resume` continues."""
    from simmp_fast.data import Cache
    from simmp_fast.training import train
    from simmp_fast.training.distributed import launched_rank

    cache = Cache.open(arguments.data, verify=launched_rank() == 0)
    device = None if arguments.device is None else choose_device(arguments.device)
    result = train(configuration(arguments, cache), cache, arguments.folder, resume=arguments.resume, device=device)
    if result.interrupted:
        return 130
    if launched_rank() == 0:
        best = "" if result.best is None else f", best validation Dice {result.best:.4f}"
        # All is saved: a terminal that is gone is no reason to fail.
        print(f"{result.epoch} epochs, {result.step} steps{best}: {result.folder}", file=Console(sys.stdout))
    return 0
