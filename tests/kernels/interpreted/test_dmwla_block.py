"""The DMW-LA block on the kernels: values, gradients and memory, compiled in one graph, and under autocast."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from simmp_fast.model import DMWLABlock, MemoryBank

pytestmark = [
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    pytest.mark.usefixtures("kernels_take_cpu_tensors"),
]
BOTH_WAYS = pytest.mark.parametrize("reassociate", [False, True], ids=["direct", "reassociated"])


def block(backend: str, reassociate: bool) -> DMWLABlock:
    """A block whose memory is structured, in training."""
    torch.manual_seed(0)
    bank = MemoryBank(3, 8, 16, warmup_steps=1, backend=backend)
    bank.set_extra_state(torch.tensor(1))
    made = DMWLABlock(12, 16, bank, backend=backend)
    with torch.no_grad():  # so large that what the block adds shows
        for parameter in made.parameters():
            parameter.normal_(0, 0.3)
    made.reassociate = reassociate
    return made.train()


def image() -> Tensor:
    return torch.randn(2, 12, 6, 6, generator=torch.Generator().manual_seed(1)).requires_grad_()


def results(made: DMWLABlock, call: Callable[[Tensor], Tensor] | None = None) -> list[Tensor]:
    """Output, gradients, memory and prototypes of a training step of the block."""
    x = image()
    output = made(x) if call is None else call(x)
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(output.dtype)
    trained = [p for p in made.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(output, [x, *trained], cotangent, allow_unused=True)
    made.commit_memory(4)
    return [output.detach(), *(g for g in gradients if g is not None), made.bank.memory, made.bank.prototypes]


@BOTH_WAYS
def test_values_gradients_and_memory(reassociate: bool) -> None:
    for kernels, definition in zip(
        results(block("triton", reassociate)), results(block("reference", reassociate)), strict=True
    ):
        torch.testing.assert_close(kernels, definition, rtol=1e-4, atol=1e-4)


@BOTH_WAYS
def test_one_graph(reassociate: bool) -> None:
    made = block("triton", reassociate)
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    for one, other in zip(results(made, compiled), results(block("triton", reassociate)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@BOTH_WAYS
def test_autocast(reassociate: bool) -> None:
    with torch.autocast("cpu", torch.float16):
        found = results(block("triton", reassociate))
        expected = results(block("reference", reassociate))
    for kernels, definition in zip(found, expected, strict=True):
        assert kernels.dtype == definition.dtype
        torch.testing.assert_close(kernels, definition, rtol=0.02, atol=0.02 * definition.abs().max().item())
