"""What stands in place of timm's own modules gives timm's results."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.layers import RelPosMlp
from torch import Tensor, nn

from simmp_fast.model import lean


def both(make, inputs: tuple[Tensor, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """Output and gradients, of the inputs and then of the parameters, of timm's module and of the lean one."""
    found = []
    for way in (lambda network: None, lean.make_lean):
        torch.manual_seed(0)
        network = nn.Sequential(make()).double().eval()
        way(network)
        output = network(*inputs)
        parameters = [p for p in network.parameters() if p.requires_grad]
        weights = torch.linspace(-1, 1, output.numel(), dtype=torch.double).view_as(output)
        found.append([output, *torch.autograd.grad((output * weights).sum(), [*inputs, *parameters])])
    return found[0], found[1]


@pytest.mark.parametrize("outputs", [2, 3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_convolution_that_widens(outputs: int, bias: bool, layout: torch.memory_format) -> None:
    x = torch.randn(2, 6, 9, 11, dtype=torch.double).contiguous(memory_format=layout).requires_grad_()
    theirs, ours = both(lambda: nn.Conv2d(6, 6 * outputs, 5, 2, 2, groups=6, bias=bias), (x,))
    assert ours[0].is_contiguous(memory_format=layout)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_other_convolutions_stay() -> None:
    network = nn.Sequential(nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 12, 3, groups=3), nn.Conv2d(12, 12, 3))
    network.append(nn.Conv2d(1, 12, 3))  # one group because there is one channel
    lean.make_lean(network)
    assert all(type(module) is nn.Conv2d for module in network)


@pytest.mark.parametrize("window", [(4, 4), (3, 5)], ids=str)
def test_relative_positions(window: tuple[int, int]) -> None:
    area = window[0] * window[1]
    scores = torch.randn(7, 2, area, area, dtype=torch.double).requires_grad_()
    theirs, ours = both(lambda: RelPosMlp(window, 2, 16, mode="cr"), (scores,))
    for a, b in zip(ours, theirs, strict=True):  # coordinates are rounded to float32, by timm from its own logarithm
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_the_whole_backbone_gives_the_results_of_timm() -> None:
    torch.manual_seed(0)
    theirs = timm.create_model("maxxvit_rmlp_nano_rw_256", img_size=64, num_classes=0).double().eval()
    ours = timm.create_model("maxxvit_rmlp_nano_rw_256", img_size=64, num_classes=0).double().eval()
    lean.make_lean(ours)
    changed = {type(module).__name__ for module in ours.modules() if type(module).__module__ == lean.__name__}
    assert {"_WideningDepthwise", "_RelativePosition"} <= changed
    ours.load_state_dict(theirs.state_dict())
    for name, buffer in ours.named_buffers():  # of the same coordinates, to compare the rest to the last digits
        if name.endswith("rel_coords_log"):
            buffer.copy_(dict(theirs.named_buffers())[name])
    x = torch.rand(2, 3, 64, 64, dtype=torch.double)
    found = []
    for network in (theirs, ours):
        output = network.stages(network.stem(x))
        parameters = {name: p for name, p in network.named_parameters() if name.startswith(("stem.", "stages."))}
        gradients = torch.autograd.grad(output.square().sum(), list(parameters.values()))
        found.append({"output": output, **dict(zip(parameters, gradients, strict=True))})
    assert found[0].keys() == found[1].keys()
    # Gradients of biases before a softmax cancel to 0: what is left of them is compared with the largest there are.
    largest = max(float(value.detach().abs().max()) for value in found[0].values())
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-10, atol=1e-13 * largest, msg=name)
