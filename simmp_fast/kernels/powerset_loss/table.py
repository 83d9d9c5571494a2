"""Pinned configurations of the subset loss, and how its kernels are compiled ahead of time.

Width is heads times padded classes: the logits that a pixel keeps in registers. Rows were chosen by their resources
alone (registers, stack, shared memory), without a GPU.
"""

from __future__ import annotations

import functools

import triton

from ..aot import POINTERS, Signature, register_kernel
from ..configs import Config, register_table
from .backward import powerset_loss_cell_backward, powerset_loss_pixel_backward
from .forward import powerset_loss_sums, powerset_loss_terms
from .geometry import tiling

# kernel             dtype width capabilities tiles             warps stages shared_KiB stack provenance
register_table("""
powerset_loss_sums   any   64    all          BLOCK_P=128       4     1      48         0     ahead-of-time
powerset_loss_sums   any   192   all          BLOCK_P=32        8     1      48         0     ahead-of-time
powerset_loss_terms  any   192   all          BLOCK_T=64        4     1      48         0     ahead-of-time
powerset_loss_pixels any   64    all          TILE_Y=8,TILE_X=16 4    1      48         0     ahead-of-time
powerset_loss_pixels any   192   all          TILE_Y=4,TILE_X=8 8     1      48         0     ahead-of-time
powerset_loss_cells  any   192   all          BLOCK=256         4     1      48         0     ahead-of-time
""")
KERNELS = {
    "powerset_loss_sums": powerset_loss_sums,
    "powerset_loss_terms": powerset_loss_terms,
    "powerset_loss_pixels": powerset_loss_pixel_backward,
    "powerset_loss_cells": powerset_loss_cell_backward,
}


def padded_classes(classes: int) -> int:
    """`BLOCK_K` for a number of classes: a power of two that the backward's matrix product takes."""
    return max(16, triton.next_power_of_2(classes))


def _signature(name: str, config: Config, dtype: str) -> Signature:
    """The network's heads under a 256x256 label: 4 heads and 9 classes, or for the widest class 6 heads and 32."""
    sides, classes = ((7, 14, 28, 56, 56, 56), 32) if config.width == 192 else ((7, 14, 28, 56), 9)
    count = len(sides)
    low, floats = POINTERS[dtype], "*fp32:16"
    tile = [config.tiles.get(axis, 8) for axis in ("TILE_Y", "TILE_X")]
    plan = tiling([(s, s) for s in sides], (256, 256), 20, classes, tile, config.tiles.get("BLOCK", 256))
    arguments: dict[str, str | tuple[str, ...]] = {
        "heads": (low,) * count, "gradients": (low,) * count, "sizes": ("i32",) * (2 * count),
        "strides": ("i32",) * (4 * count), "offsets": ("i64",) * count, "spans": ("i32",) * (2 * count),
        "label": "*i64:16", **dict.fromkeys(("partials", "terms", "coefficients", "upstream", "workspace"), floats),
        **dict.fromkeys(("ce_weight", "dice_weight", "smooth", "pixels"), "fp32"),
        **dict.fromkeys(("pixel_height", "pixel_width", "label_b", "label_y", "label_x", "tiles", "blocks"), "i32"),
    }  # fmt: skip
    constants = {
        "HEADS": count, "SAME": 0, "CLASSES": classes, "BLOCK_K": padded_classes(classes), "WEIGHTED": False,
        "subset_weight": None, "CELLS_Y": plan.cells_y, "CELLS_X": plan.cells_x, "CELLS": plan.cells,
        **({"TILE_Y": 8, "TILE_X": 16} if name == "powerset_loss_cells" else {}),
    }  # fmt: skip
    kernel = KERNELS[name]
    return Signature(
        kernel,
        {key: text for key, text in arguments.items() if key in kernel.arg_names},
        {key: value for key, value in constants.items() if key in kernel.arg_names},
        products=False,
    )


for _name in KERNELS:
    register_kernel(_name, functools.partial(_signature, _name))
