"""The portable backend against the definition on a CPU: ``python -m bench.portable`` prints a table.

Each row has a process of its own, in which both backends run in turns, so a busy machine slows both; a row says how
many times faster the portable backend is (median of the pairs, and their 20th and 80th percentile). ``--threads 1``
compares processor time in place of the clock's: on a busy machine two threads wait for one another, and most so where
the work between is short.
Peak memory is measured in a fresh process for each backend (Linux): the most that the process held at once, beyond
what it held with the inputs in place and both libraries loaded.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from simmp_fast import ops, portable, reference
from simmp_fast.config import preset
from simmp_fast.model import SimMPNet

BACKENDS: dict[str, ModuleType] = {"reference": reference, "portable": portable}
Step = Callable[[], object]
Row = Callable[[str], Step]
ROWS: dict[str, Row] = {}
# For so long, pairs of a short step are taken.
SECONDS = 3.0


def row(name: str) -> Callable[[Row], Row]:
    """Register what makes a step from the name of a backend."""

    def register(make: Row) -> Row:
        ROWS[name] = make
        return make

    return register


def _tokens(count: int, grid: int, dim: int, batch: int = 1, scale: float = 0.3) -> list[Tensor]:
    return [torch.randn(batch, grid * grid, dim).mul_(scale).requires_grad_() for _ in range(count)]


def _backward(output: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(output, inputs, torch.ones_like(output))


# --- DMW-LA blocks --------------------------------------------------------------------------------


def _block(backend: str, channels: int, dim: int, clusters: int, grid: int, batch: int = 1) -> Step:
    """A block forward and backward on tokens; the portable one takes its context in C dims where that is fewer."""
    ops = BACKENDS[backend]
    (x,) = _tokens(1, grid, channels, batch)
    theta, phi, g = (torch.randn(dim, channels).mul_(channels**-0.5).requires_grad_() for _ in range(3))
    o = torch.randn(channels, dim).mul_(dim**-0.5).requires_grad_()
    memory, prototypes = torch.rand(clusters, 100, dim), torch.rand(clusters, dim)

    def direct() -> Tensor:
        attended, _ = ops.memory_context_attention(x @ theta.t(), x @ phi.t(), x @ g.t(), memory, prototypes)
        return x + attended @ o.t()

    def reassociated() -> Tensor:
        recalled, _ = ops.memory_attention(x @ theta.t(), memory, prototypes)
        context = ops.context_attention(x @ (theta.t() @ phi), x, x)
        return x + recalled @ o.t() + context @ (o @ g).t()

    block = reassociated if backend == "portable" and channels < dim else direct
    return lambda: _backward(block(), [x, theta, phi, g, o])


row("DMW-LA block 56x56, C=96, D=256, K=9")(lambda backend: _block(backend, 96, 256, 9, 56))
row("DMW-LA block 56x56, C=96, D=128, K=4")(lambda backend: _block(backend, 96, 128, 4, 56))
row("DMW-LA block 56x56, C=96, D=256, K=9, batch 2")(lambda backend: _block(backend, 96, 256, 9, 56, batch=2))
row("DMW-LA block 28x28, C=192, D=256, K=9, batch 2")(lambda backend: _block(backend, 192, 256, 9, 28, batch=2))
row("DMW-LA block 14x14, C=384, D=256, K=9, batch 2")(lambda backend: _block(backend, 384, 256, 9, 14, batch=2))


# --- operators ------------------------------------------------------------------------------------


@row("context_attention 56x56, D=256")
def _context(backend: str) -> Step:
    inputs = _tokens(3, 56, 256)
    return lambda: _backward(BACKENDS[backend].context_attention(*inputs), inputs)


@row("memory_attention 56x56, D=256, K=9")
def _memory(backend: str) -> Step:
    (query,) = _tokens(1, 56, 256)
    memory, prototypes = torch.rand(9, 100, 256), torch.rand(9, 256)
    return lambda: _backward(BACKENDS[backend].memory_attention(query, memory, prototypes)[0], [query])


@row("assign_clusters 56x56, D=256, K=9")
def _assign(backend: str) -> Step:
    (query,), prototypes = _tokens(1, 56, 256), torch.rand(9, 256)
    return lambda: BACKENDS[backend].assign_clusters(query, prototypes)


@row("update_memory 56x56, D=256, K=9")
def _update(backend: str) -> Step:
    (tokens,), memory, prototypes = _tokens(1, 56, 256), torch.rand(9, 100, 256), torch.rand(9, 256)
    return lambda: BACKENDS[backend].update_memory(tokens, memory, prototypes, 50)


@row("window_similarity 14x14, C=384, batch 2")
def _window(backend: str) -> Step:
    x = torch.randn(2, 384, 14, 14)
    return lambda: BACKENDS[backend].window_similarity(x, 7)


def _split(backend: str, grid: int, batch: int) -> Step:
    ops, inputs = BACKENDS[backend], _tokens(3, grid, 384, batch)

    def step() -> object:
        split = ops.split_threshold(inputs[0], inputs[1])
        return _backward(ops.split_attention(*inputs, *split), inputs)

    return step


row("split_threshold and split_attention 14x14, C=384, batch 2")(lambda backend: _split(backend, 14, 2))
row("split_threshold and split_attention 56x56, C=384")(lambda backend: _split(backend, 56, 1))


def _loss(backend: str, grids: tuple[int, ...]) -> Step:
    heads = [torch.randn(2, 9, grid, grid, requires_grad=True) for grid in grids]
    label = torch.randint(9, (2, 256, 256))
    return lambda: _backward(BACKENDS[backend].powerset_loss(heads, label), heads)


row("powerset_loss, 4 heads 7..56 to 256x256, 9 classes, batch 2")(lambda backend: _loss(backend, (7, 14, 28, 56)))
row("powerset_loss, 4 heads at 256x256, 9 classes, batch 2")(lambda backend: _loss(backend, (256,) * 4))


# --- The network ------------------------------------------------------------------------------------


class _Given(nn.Module):
    """In the backbone's place: feature maps and a gated image that are just there, and take gradients."""

    def __init__(self, features: list[Tensor], gated: Tensor) -> None:
        super().__init__()
        self.features = nn.ParameterList(features)
        self.gated = nn.Parameter(gated)

    def forward(self, image: Tensor) -> tuple[list[Tensor], Tensor]:
        return list(self.features), self.gated


def _network(backend: str, with_backbone: bool, reassociate: bool | None = None) -> Step:
    """A whole training step of the `synapse` preset, its memory structured: batch 2 at 256x256."""
    model = SimMPNet(preset("synapse").model, backend)
    structured = torch.tensor(model.config.warmup_steps)
    for block in model.memory_blocks():
        block.bank.set_extra_state(structured)
        block.reassociate = reassociate
    image, label = torch.rand(2, 1, 256, 256), torch.randint(9, (2, 256, 256))
    if not with_backbone:
        with torch.no_grad():
            features, gated = model.backbone(model.adapter(image))
        model.backbone = _Given(features, gated)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    keep = torch.tensor(True)

    def step() -> object:
        optimizer.zero_grad()
        loss = ops.powerset_loss(model(image, native_heads=True), label, backend=backend)
        loss.backward()
        model.commit_memory(keep)
        optimizer.step()
        return model.wld.step(loss)

    return step


row("training step, synapse, 256x256, batch 2")(lambda backend: _network(backend, True))
row("the same without its backbone")(lambda backend: _network(backend, False))


# --- measuring ------------------------------------------------------------------------------------


def seconds(step: Step) -> float:
    """Time of one step: the clock's, or on one thread the processor's."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    step()
    return clock() - start


def ratios(name: str, pairs: int) -> list[float]:
    """Time of the definition over time of the portable backend, pair by pair, rising; short steps take more pairs."""
    torch.manual_seed(0)
    first, second = (ROWS[name](backend) for backend in ("reference", "portable"))
    first(), second()
    found, end = [], time.monotonic() + SECONDS
    while len(found) < pairs or (time.monotonic() < end and len(found) < 20 * pairs):
        found.append(seconds(first) / seconds(second))
    return sorted(found)


def status_bytes(field: str) -> int:
    """Bytes of VmRSS (held now) or VmHWM (the most held) of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def _fresh(name: str, threads: int, *options: str) -> list[str]:
    """What a fresh process prints for one row: what ran before changes how the allocator meets large tensors."""
    command = [sys.executable, "-m", "bench.portable", "--row", name, "--threads", str(threads), *options]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()


def _print_peak(name: str, backend: str) -> None:
    step = ROWS[name](backend)
    _block(backend, 8, 16, 2, 24)()
    before = status_bytes("VmRSS")
    step(), step()
    print(max(0, status_bytes("VmHWM") - before))


def main() -> None:
    """Print the table, or the figures of one row for the process that asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=9, help="fewest pairs of a row")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default="", help="rows whose name holds this text")
    parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)
    parser.add_argument("--peak", choices=BACKENDS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.peak:
        _print_peak(arguments.row, arguments.peak)
        return
    if arguments.row:
        print(*ratios(arguments.row, arguments.pairs))
        return
    print("| forward and backward, float32 | times faster | 20th..80th percentile | peak MiB, definition | portable |")
    print("|---|---|---|---|---|")
    for name in (name for name in ROWS if arguments.only in name):
        found = [float(ratio) for ratio in _fresh(name, arguments.threads, "--pairs", str(arguments.pairs))]
        low, high = found[len(found) // 5], found[-1 - len(found) // 5]
        peaks = [int(_fresh(name, arguments.threads, "--peak", backend)[-1]) / 2**20 for backend in BACKENDS]
        print(
            f"| {name} | {statistics.median(found):.1f} | {low:.1f}..{high:.1f} | {peaks[0]:.0f} | {peaks[1]:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
