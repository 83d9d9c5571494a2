"""``simmp-fast prepare``: from a data set to a checked, memory-mapped cache."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from simmp_fast.cli.common import add_command

_EXAMPLE = """simmp-fast prepare demo --out cache/demo --image-size 128
  simmp-fast prepare my_data.yaml --out cache/my_data
  simmp-fast prepare synapse --source downloads/Synapse --out cache/synapse
  simmp-fast prepare acdc --source downloads/ACDC --split mt_unet --out cache/acdc

published data sets, in a folder that you downloaded (docs/datasets.md has the layouts):
  synapse    case0005_slice000.npz and case0001.npy.h5, or raw: img0001.nii.gz and label0001.nii.gz
  acdc       raw: patient001_frame01.nii.gz and patient001_frame01_gt.nii.gz, or prepared npz or h5 files
  isic2018   the folders ISIC2018_Task1-2_Training_Input and ISIC2018_Task1_Training_GroundTruth
  segpc2021  the folders train/x, train/y, validation/x and validation/y

a YAML file for your own folder of images and masks, NIfTI volumes or pictures:
  name: my_data
  classes: [background, lesion]
  images: images              # a folder, or a pattern such as scans/*_t1.nii.gz
  masks: masks                # files of the same names
  mask_values: {0: 0, 255: 1} # optional: value in the mask to class
  split: {validation: 0.2, test: 0.2} # optional: shares of the cases, train takes the rest"""


def register(commands: Any) -> None:
    """Add the command."""
    parser = add_command(commands, "prepare", "check a data set and write its cache", _EXAMPLE)
    parser.add_argument(
        "dataset", help="demo, synapse, acdc, isic2018, segpc2021, or the YAML file that describes your data"
    )
    parser.add_argument("--source", type=Path, metavar="DIR", help="folder of a published data set, as downloaded")
    parser.add_argument("--split", metavar="NAME", help="acdc: released (if none is named), mt_unet or ssl4mis")
    parser.add_argument("--out", type=Path, required=True, help="folder of the cache")
    parser.add_argument(
        "--image-size", type=int, default=256, help="side of the network's square in pixels [S1], a multiple of 32"
    )
    parser.add_argument("--force", action="store_true", help="replace a cache that is already there")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Prepare and say what the cache holds."""
    from simmp_fast.data import open_source, prepare
    from simmp_fast.data.description import check_image_size

    check_image_size(arguments.image_size, "--image-size")
    source = open_source(arguments.dataset, arguments.source, arguments.split)
    cache = prepare(source, arguments.out, arguments.image_size, force=arguments.force)
    parts = ", ".join(
        f"{name} {sum(cache.case(i).slices for i in ids)} slices of {len(ids)} cases"
        for name, ids in cache.splits.items()
    )
    print(f"{cache.name}: {parts}; classes: {', '.join(cache.classes)}")
    print(f"cache: {arguments.out}")
