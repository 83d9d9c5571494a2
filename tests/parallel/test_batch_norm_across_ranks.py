"""Batch norm of several ranks is that of one process on the concatenated batch."""

from __future__ import annotations

import copy

import processes
import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from simmp_fast.parallel.batch_norm import synchronise_batch_norm
from simmp_fast.ranks import Ranks

CHANNELS = 3


def network(dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(CHANNELS), nn.ReLU(inplace=True), BatchNormAct2d(CHANNELS, act_layer=nn.SiLU))
    for name, parameter in model.named_parameters():
        nn.init.uniform_(parameter, 0.5 if name.endswith("weight") else -0.5, 1.0)
    return model.to(dtype)


def batches(dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Two batches of six images, each with a gradient; channels-last, with an offset that differs between images."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(2):
        x, grad = torch.randn(2, 6, CHANNELS, 2, 5, generator=generator)
        x = x * 2 + torch.arange(6).view(6, 1, 1, 1)
        found.append((x.to(dtype, memory_format=torch.channels_last), grad.to(dtype)))
    return found


def trained(ranks: Ranks, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Outputs and input gradients of this rank's images, its parameter gradients, and the state, after two batches."""
    model = network(dtype)
    if ranks.size > 1:
        synchronise_batch_norm(model, ranks)
    of_images: list[Tensor] = []
    for x, grad in batches(dtype):
        x, grad = (t.tensor_split(ranks.size)[ranks.rank].clone() for t in (x, grad))
        y = model(x.requires_grad_())
        y.backward(grad)
        of_images += [y.detach(), x.grad]
    with torch.no_grad():
        of_images.append(model.eval()(x))
    return of_images, [p.grad for p in model.parameters()], list(model.state_dict().values())


@pytest.mark.parametrize(
    ("size", "dtype", "tolerance"), [(2, torch.float64, 1e-13), (3, torch.float64, 1e-13), (2, torch.float32, 1e-5)]
)
def test_equal_to_one_process(size: int, dtype: torch.dtype, tolerance: float) -> None:
    results = processes.run(trained, size, dtype)
    images, gradients, state = processes.alone(trained, torch.float64)

    def close(a: Tensor, b: Tensor) -> None:
        torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=tolerance)

    for i, expected in enumerate(images):
        close(torch.cat([result[0][i] for result in results]), expected)
    for i, expected in enumerate(gradients):
        close(torch.stack([result[1][i] for result in results]).sum(0), expected)
    for i, expected in enumerate(state):
        assert all(torch.equal(result[2][i], results[0][2][i]) for result in results)
        close(results[0][2][i], expected)


def test_names_and_tensors_stay() -> None:
    model = network(torch.float32)
    before = {name: id(tensor) for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    synchronise_batch_norm(model, Ranks(0, 2))
    assert before == {name: id(tensor) for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    plain = copy.deepcopy(network(torch.float32)).eval()
    x = batches(torch.float32)[0][0]
    assert torch.equal(model.eval()(x.clone()), plain(x.clone()))


def test_another_batch_norm_is_named() -> None:
    model = nn.Sequential(nn.ReLU(), nn.BatchNorm1d(2))
    with pytest.raises(TypeError, match=r"1: got BatchNorm1d, expected BatchNorm2d or BatchNormAct2d"):
        synchronise_batch_norm(model, Ranks(0, 2))
