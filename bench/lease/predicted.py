"""What the step is expected to take on an H100: predictions, to be read beside measurements (docs/gpu.md).

They come from the kernels' machine code for sm_90 (registers, instructions, programs a multiprocessor), operations and
bytes by formula, and assumed ceilings of 798 TFLOP/s in bfloat16 and 3.0 TB/s; each may be off by a third. For a batch
of 20 at 256x256 in bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """Kernels that belong together.

    Attributes:
        name: as the table prints it.
        ms: predicted, a step.
        kernels: beginnings of their names in a profile.
    """

    name: str
    ms: float
    kernels: tuple[str, ...]


PARTS = (
    Part("attention", 4.7, ("attention_",)),
    Part("memory update", 2.2, ("assign_", "fold_statistics", "score_tokens", "write_slots")),
    Part("loss", 1.5, ("powerset_",)),
    Part("DS-GIM", 0.5, ("split_", "window_", "decay_")),
)
# Everything else, backbone and optimiser included, by form.
REST = {"triton": 33.1, "triton-graph": 33.1, "triton-fast": 18.1}
# Milliseconds of a whole step: least, expected, most.
STEP = {"triton": (30.0, 42.0, 55.0), "triton-graph": (28.0, 42.0, 55.0), "triton-fast": (20.0, 27.0, 34.0)}
# Peak memory of a step above what is there before it, GiB, by the allocator's account on the null GPU; the workspace of
# cuDNN's convolutions comes on top. By form and dtype.
PEAK = {
    ("reference", "float32"): 33.79,
    ("reference", "bfloat16"): 20.65,
    ("portable", "float32"): 8.31,
    ("portable", "bfloat16"): 4.94,
    ("triton", "float32"): 7.63,
    ("triton", "bfloat16"): 4.55,
    ("triton-channels-last", "bfloat16"): 4.55,
    ("triton-graph", "bfloat16"): 4.54,
    ("triton-compiled", "bfloat16"): 4.74,
    ("triton-fast", "bfloat16"): 4.67,
    ("portable-compiled", "bfloat16"): 4.94,
}
