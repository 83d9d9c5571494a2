"""``simmp-fast predict``: label maps of new images."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from simmp_fast.cli.common import add_command, add_model_options, choose_device, load_network, load_recipe

_EXAMPLE = """simmp-fast predict runs/demo head.nii.gz --out head_labels.nii.gz --overlays
  simmp-fast predict runs/mine scans/ --out labels/ --probabilities"""


def register(commands: Any) -> None:
    """Add the command."""
    parser = add_command(commands, "predict", "segment NIfTI volumes or pictures, geometry kept", _EXAMPLE)
    add_model_options(parser)
    parser.add_argument("input", type=Path, help="a NIfTI volume, a picture, or a folder of them")
    parser.add_argument("--out", type=Path, required=True, help="the label map, or a folder for label maps")
    parser.add_argument("--probabilities", action="store_true", help="also write the class probabilities")
    parser.add_argument("--overlays", action="store_true", help="also draw the label map on a few slices")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are already there")
    parser.add_argument("--recipe", type=Path, help="a data.json (default: the one beside the weights)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Predict and print the files written."""
    from simmp_fast.evaluation.predict import predict

    device = choose_device(arguments.device)
    model, weights = load_network(arguments.model, arguments.backend)
    written = predict(
        model,
        load_recipe(weights, arguments.recipe),
        arguments.input,
        arguments.out,
        mirror=arguments.mirror,
        probabilities=arguments.probabilities,
        overlays=arguments.overlays,
        overwrite=arguments.overwrite,
        batch_size=arguments.batch_size,
        device=device,
        precision=arguments.precision,
        progress=True,
    )
    for path in written:
        print(path)
