"""``simmp-fast convert``: a checkpoint of the authors' released code becomes a folder of this package."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from simmp_fast.cli.common import add_command
from simmp_fast.config import ConfigError

_EXAMPLE = """simmp-fast convert synapse_best.pth --out networks/synapse

variants:
  released  computes what the released code computes, for the released numbers
  paper     computes what the paper defines, with the same weights (docs/errata.md has the differences)"""


def register(commands: Any) -> None:
    """Add the command."""
    parser = add_command(commands, "convert", "read a checkpoint of the authors' released code", _EXAMPLE)
    parser.add_argument("checkpoint", type=Path, help="the released checkpoint; read without unpickling code")
    parser.add_argument("--out", type=Path, required=True, help="folder for config.json and model.safetensors")
    parser.add_argument("--variant", choices=("released", "paper"), default="released", help="see below")
    parser.add_argument("--in-channels", type=int, choices=(1, 3), default=1, help="channels of your images")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Convert and say what came out."""
    from simmp_fast.data.errors import disk_errors
    from simmp_fast.evaluation.report import check_folder
    from simmp_fast.folders import finish_folder, others
    from simmp_fast.model import SimMPNet
    from simmp_fast.model.pretrained import WEIGHTS_FILE

    check_folder(arguments.out)
    with disk_errors(arguments.out):
        finish_folder(arguments.out, WEIGHTS_FILE)
        taken = arguments.out.is_dir() and others(arguments.out)
    if taken:
        raise ConfigError(f"--out: got {arguments.out}, which is there already, expected a new or an empty folder")
    model = SimMPNet.from_released(arguments.checkpoint, arguments.variant, in_channels=arguments.in_channels)
    model.save_pretrained(arguments.out)
    config = model.config
    print(
        f"{model.parameter_count() / 1e6:.2f} M parameters, {config.classes} classes, K = {config.clusters}, "
        f"D = {config.feature_dim}, memory {model.memory_phase}, variant {config.variant}: {arguments.out}"
    )
