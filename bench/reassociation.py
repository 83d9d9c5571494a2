"""A DMW-LA block on the portable backend, both ways: ``python -m bench.reassociation`` prints two tables.

The first compares context attention in D dimensions with the same sum in C dimensions (performance identity 3), in
turns in one process, by the clock or, with ``--threads 1``, by processor time. The second shows how the block's peak
memory grows with N, each length in a fresh process (Linux).
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Callable

import torch

from bench.portable import seconds, status_bytes
from simmp_fast.model import DMWLABlock, MemoryBank

# (C, D, K, side of the grid): the blocks of the presets in which C < D.
BLOCKS = ((96, 256, 9, 56), (96, 128, 4, 56), (192, 256, 9, 28))
GRIDS = (28, 56, 112)


def training_step(channels: int, dim: int, clusters: int, grid: int, reassociate: bool | None) -> Callable[[], None]:
    """Forward, backward and memory update of a block whose memory is structured, batch 1."""
    torch.manual_seed(0)
    bank = MemoryBank(clusters, 100, dim, warmup_steps=1, backend="portable")
    bank.set_extra_state(torch.tensor(1))
    block = DMWLABlock(channels, dim, bank, backend="portable")
    block.reassociate = reassociate
    x = torch.randn(1, channels, grid, grid, requires_grad=True)

    def step() -> None:
        block(x).sum().backward()
        block.commit_memory(50)

    return step


def _print_ratios(pairs: int) -> None:
    print("| block, forward, backward and memory update | C dims over D dims, times faster | least..most |")
    print("|---|---|---|")
    for channels, dim, clusters, grid in BLOCKS:
        plain, reassociated = (training_step(channels, dim, clusters, grid, flag) for flag in (False, True))
        plain(), reassociated()
        found = [seconds(plain) / seconds(reassociated) for _ in range(pairs)]
        name = f"{grid}x{grid}, C={channels}, D={dim}, K={clusters}"
        print(f"| {name} | {statistics.median(found):.1f} | {min(found):.1f}..{max(found):.1f} |", flush=True)


def _print_peak(grid: int) -> None:
    """MiB that two steps add to what a small block has already taken."""
    training_step(96, 256, 9, 8, None)()
    step = training_step(96, 256, 9, grid, None)
    before = status_bytes("VmRSS")
    step(), step()
    print((status_bytes("VmHWM") - before) / 2**20)


def main() -> None:
    """Print both tables, or one peak for the process that asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.peak:
        _print_peak(arguments.peak)
        return
    _print_ratios(arguments.pairs)
    print("\n| N | peak MiB, C=96, D=256, K=9, batch 1 |\n|---|---|")
    for grid in GRIDS:
        command = [sys.executable, "-m", "bench.reassociation", "--peak", str(grid)]
        peak = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
        print(f"| {grid * grid:,} | {peak:.0f} |", flush=True)


if __name__ == "__main__":
    main()
