"""Every kernel on small ragged shapes, forward and backward: what `sanitize.sh` runs under compute-sanitizer.

The whole edge grid would take too long there. A case is an operator of the parity tests with one of their names;
together they launch every kernel of the tables, which `tests/kernels/interpreted/test_sanitized.py` checks.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / folder) for folder in (".", "tests", "tests/kernels")]

import dmwla_cases  # noqa: E402
import dsgim_cases  # noqa: E402
from parity import named_gradients  # noqa: E402
from parity_cases import build  # noqa: E402

from simmp_fast import kernels  # noqa: E402

dmwla_cases.register()
dsgim_cases.register()

# Ragged: more than one tile of tokens, or a last tile that is not full; heads in one part and in two.
CASES = (
    ("assign_clusters", "past_a_tile_cosine"),
    ("context_attention", "dim_96"),
    ("context_attention", "tile_and_one"),
    ("memory_attention", "dim_80"),
    ("memory_attention", "fixed_cluster"),
    ("memory_context_attention", "past_a_tile"),
    ("memory_context_attention", "dim_130"),
    ("update_memory", "tile_and_one"),
    ("update_memory", "slots_133"),
    ("window_similarity", "channels_129"),
    ("decay_weights", "network_paper"),
    ("split_threshold", "31_tokens"),
    ("split_threshold", "many_tokens"),
    ("split_attention", "tile_and_one_paper"),
    ("split_attention", "dim_65"),
    ("split_attention", "dim_256"),
    ("powerset_loss", "odd"),
    ("powerset_loss", "widest"),
)
# Name of a dtype class of the tables -> dtype, and PyTorch's precision of float32 products.
CLASSES = {
    "float32": (torch.float32, "highest"),
    "tf32": (torch.float32, "high"),
    "half": (torch.bfloat16, "highest"),
}
FINISHED = "all cases ran"
WITH_GRADIENTS = (
    "context_attention", "memory_attention", "memory_context_attention", "split_attention", "powerset_loss",
)  # fmt: skip


def launch(operator: str, name: str, dtype: torch.dtype, device: str) -> None:
    """Run one case, with its backward where there is one."""
    function, inputs = getattr(kernels, operator), build(operator, name, seed=0, dtype=dtype, device=device)
    if operator in WITH_GRADIENTS:
        named_gradients(operator, function, inputs)
    else:
        function(**inputs)


def chosen(names: Sequence[str]) -> list[tuple[str, str]]:
    """The cases of the names given, ``operator`` or ``operator:case``; all where there are none.

    Raises:
        ValueError: a name of no case.
    """
    for name in names:
        if not any(name in (operator, f"{operator}:{case}") for operator, case in CASES):
            raise ValueError(f"case: got {name!r}, expected {', '.join(f'{o}:{c}' for o, c in CASES)}, or an operator")
    return [(o, c) for o, c in CASES if not names or o in names or f"{o}:{c}" in names]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cases on the current CUDA device, telling which so that an error has a name."""
    parser = argparse.ArgumentParser(description="launch every kernel on small ragged shapes")
    parser.add_argument("case", nargs="*", help="operator, or operator:case (default: all)")
    parser.add_argument("--class", nargs="+", choices=tuple(CLASSES), default=tuple(CLASSES), dest="kinds")
    options = parser.parse_args(arguments)
    try:
        cases = chosen(options.case)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    for kind in options.kinds:
        dtype, precision = CLASSES[kind]
        torch.set_float32_matmul_precision(precision)
        for operator, name in cases:
            print(f"{operator} {name} {kind}", flush=True)
            launch(operator, name, dtype, "cuda")
            torch.cuda.synchronize()
    print(FINISHED, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
