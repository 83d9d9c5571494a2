"""The portable operators make no host wait and no shape depend on data: eager, compiled, exported."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from no_sync import HostSyncError, NoHostSync
from parity import GRADIENTS, build
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

from simmp_fast import portable

# Two shapes of each operator. The long ones take the chunked loops.
SHAPES = {
    "assign_clusters": ("odd_cosine", "long_cosine"),
    "context_attention": ("odd", "long"),
    "memory_attention": ("odd", "long"),
    "memory_context_attention": ("odd", "long"),
    "update_memory": ("odd", "k_tensor"),
    "window_similarity": ("network", "wide"),
    "split_threshold": ("31_tokens", "196_tokens"),
    "split_attention": ("odd_paper", "long_paper"),
    "powerset_loss": ("native", "odd"),
}
EVERY = [(operator, case) for operator, cases in SHAPES.items() for case in cases]


def inputs_of(operator: str, case: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """The arguments of a case, with gradients where the operator has any."""
    inputs = build(operator, case, seed=0, dtype=dtype, device="cpu")
    for name in GRADIENTS.get(operator, ()):
        inputs[name] = tree_map(Tensor.requires_grad_, inputs[name])
    return inputs


def forward_backward(function: Callable[..., Any], inputs: dict[str, Any]) -> list[Tensor]:
    """The outputs and, where there are any, the gradients of the sum of the first."""
    outputs = tree_leaves(function(**inputs))
    leaves = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.requires_grad]
    if not leaves:
        return outputs
    weights = torch.linspace(-1, 1, outputs[0].numel(), dtype=outputs[0].dtype, device=outputs[0].device)
    gradients = torch.autograd.grad((outputs[0] * weights.view(outputs[0].shape)).sum(), leaves)
    return [*(output.detach() for output in outputs), *gradients]


@pytest.mark.parametrize(("operator", "case"), EVERY)
def test_no_host_sync(operator: str, case: str) -> None:
    with NoHostSync():
        forward_backward(getattr(portable, operator), inputs_of(operator, case))


@pytest.mark.parametrize(("operator", "case"), EVERY)
def test_no_host_sync_on_a_device_that_is_not_the_host(operator: str, case: str) -> None:
    """With fake tensors of another device, whose data nobody can read: a copy to the host or a read is an error.

    Forward alone: autograd asks for the device itself.
    """
    inputs = inputs_of(operator, case)

    def faked(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")

    with FakeTensorMode(), NoHostSync():
        outputs = tree_leaves(getattr(portable, operator)(**tree_map(faked, inputs)))
    assert {output.device.type for output in outputs} == {"cuda"}


@pytest.mark.parametrize(
    "sync",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: torch.where(x > 0),
        lambda x: x.unique(),
        lambda x: torch.equal(x, x),
        lambda x: torch.repeat_interleave(x, (x > 0).long()),
    ],
)
def test_the_mode_refuses(sync: Callable[[Tensor], Any]) -> None:
    x = torch.randn(7)
    with pytest.raises(HostSyncError), NoHostSync():
        sync(x)


def test_the_mode_refuses_copies_to_the_host() -> None:
    with FakeTensorMode(), pytest.raises(HostSyncError, match="copies between cpu and cuda"), NoHostSync():
        torch.empty(3, device="cuda").cpu()


@pytest.mark.parametrize("operator", SHAPES)
def test_compiles_whole_with_two_shapes(operator: str) -> None:
    torch._dynamo.reset()
    function = getattr(portable, operator)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for case in SHAPES[operator]:
        expected = forward_backward(function, inputs_of(operator, case))
        for got, want in zip(forward_backward(compiled, inputs_of(operator, case)), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_compiles_with_dynamic_shapes_by_inductor() -> None:
    """The one operator with a loop whose length is a size."""
    torch._dynamo.reset()
    operator = "split_threshold"
    function = getattr(portable, operator)
    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    for case in SHAPES[operator]:
        expected = forward_backward(function, inputs_of(operator, case))
        for got, want in zip(forward_backward(compiled, inputs_of(operator, case)), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("operator", [name for name in SHAPES if name != "powerset_loss"])
@pytest.mark.parametrize("longer", [0, 1])
def test_exports_plain_pytorch(operator: str, longer: int) -> None:
    """An exported program runs without this package: none of its own operators is left in the graph."""
    inputs = inputs_of(operator, SHAPES[operator][longer])
    tensors = {name: value.detach() for name, value in inputs.items() if isinstance(value, Tensor)}
    other = {name: value for name, value in inputs.items() if not isinstance(value, Tensor)}

    class Module(torch.nn.Module):
        def forward(self, **tensors: Tensor) -> Any:
            return getattr(portable, operator)(**tensors, **other)

    with torch.no_grad():
        program = torch.export.export(Module(), (), tensors)
        got = program.module()(**tensors)
        torch.testing.assert_close(got, Module()(**tensors), rtol=1e-5, atol=1e-5)
    assert not [node for node in program.graph.nodes if "simmp_fast" in str(node.target)]
