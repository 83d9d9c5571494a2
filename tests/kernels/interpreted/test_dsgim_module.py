"""The DS-GIM module on the kernels: its values, its gradients, and how many launches a call takes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from simmp_fast.model import DSGIM

pytestmark = pytest.mark.usefixtures("kernels_take_cpu_tensors")


def module(backend: str, variant: str = "paper") -> DSGIM:
    torch.manual_seed(0)
    made = DSGIM(24, 7, variant=variant, backend=backend)
    made.refine = nn.Identity()  # type: ignore[assignment]
    return made


def image() -> Tensor:
    return torch.randn(2, 24, 14, 14, generator=torch.Generator().manual_seed(1)).requires_grad_()


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_values_and_gradients(variant: str) -> None:
    """Within float32 of the definition; the seed is one without a near-tie in the split."""
    results = []
    for backend in ("reference", "triton"):
        made, x = module(backend, variant), image()
        output = made(x, 0.8)
        cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
        results.append((output, *torch.autograd.grad(output, [x, *made.parameters()], cotangent)))
    for definition, kernels in zip(*results, strict=True):
        # A common shift of all scores of a row has no gradient: what the key's bias gets is rounding of sums near 1.
        torch.testing.assert_close(kernels, definition, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_one_graph(autocast: bool) -> None:
    results = []
    for compiled in (False, True):
        made, x = module("triton"), image()
        call = torch.compile(made, fullgraph=True, backend="aot_eager") if compiled else made
        with torch.autocast("cpu", torch.float16) if autocast else nullcontext():
            output = call(x, 0.8)
        cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(output.dtype)
        results.append((output, *torch.autograd.grad(output, [x, *made.parameters()], cotangent)))
    for eager, found in zip(*results, strict=True):
        torch.testing.assert_close(found, eager, rtol=1e-3, atol=1e-3 if autocast else 1e-5)


class Launches(TorchDispatchMode):
    """PyTorch's own operators that would start a kernel; those of the package count their launches themselves."""

    VIEWS = ("view", "_unsafe_view", "t", "transpose", "permute", "expand", "slice", "split_with_sizes", "select")
    NONE = (
        *VIEWS,
        "unbind",
        "unsqueeze",
        "squeeze",
        "detach",
        "alias",
        "empty",
        "empty_like",
        "new_empty",
        "as_strided",
    )

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if func.namespace != "simmp_fast" and name not in self.NONE:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_at_most_twelve_launches(wrap_launches: Callable[..., None], autocast: bool) -> None:
    """A forward call without its convolutions, whose input lies channels-first."""
    made, x = module("triton"), image()
    launches = Launches()

    def around(launch: Callable[..., None]) -> Callable[..., None]:
        def call(kernel: Any, grid: Any, config: Any, *rest: Any, **named: Any) -> None:
            before = len(launches.names)
            launch(kernel, grid, config, *rest, **named)
            launches.names[before:] = [config.kernel]  # whatever the interpreter called in PyTorch is this launch

        return call

    wrap_launches(around)
    with launches, torch.autocast("cpu", torch.float16) if autocast else nullcontext():
        made(x, 0.8)
    assert 4 <= len(launches.names) <= 12, launches.names
