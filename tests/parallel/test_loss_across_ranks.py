"""Loss and gradients of several ranks are those of one process on the concatenated batch."""

from __future__ import annotations

import processes
import pytest
import torch
from torch import Tensor

from simmp_fast import ops
from simmp_fast.parallel.powerset_loss import powerset_loss
from simmp_fast.ranks import Ranks

CLASSES, SIDE = 3, 8


def batch(images: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(images)
    heads = [3 * torch.randn(images, CLASSES, side, side, generator=generator) for side in (2, 4, 8)]
    label = torch.randint(2, (images, SIDE, SIDE), generator=generator)
    label[-1, 3:] = 2  # a class that only the last rank sees
    return [head.to(dtype) for head in heads], label


def own(ranks: Ranks, x: Tensor) -> Tensor:
    """This rank's part of the batch."""
    return x.tensor_split(ranks.size)[ranks.rank]


def loss_and_gradients(ranks: Ranks, heads: list[Tensor], label: Tensor) -> tuple[Tensor, list[Tensor]]:
    leaves = [own(ranks, head).clone().requires_grad_() for head in heads]
    loss = powerset_loss(leaves, own(ranks, label), backend="portable", ranks=ranks)
    (2 * loss).backward()
    return loss.detach(), [leaf.grad for leaf in leaves if leaf.grad is not None]


@pytest.mark.parametrize(
    ("size", "dtype", "tolerance"), [(2, torch.float64, 1e-14), (3, torch.float64, 1e-14), (2, torch.float32, 1e-6)]
)
def test_equal_to_one_process(size: int, dtype: torch.dtype, tolerance: float) -> None:
    heads, label = batch(6, dtype)
    results = processes.run(loss_and_gradients, size, heads, label)
    leaves = [head.double().requires_grad_() for head in heads]
    loss = ops.powerset_loss(leaves, label, backend="reference")
    (2 * loss).backward()
    for found, _ in results:
        assert torch.equal(found, results[0][0])
        torch.testing.assert_close(found.double(), loss.detach(), rtol=10 * tolerance, atol=0)
    for i, leaf in enumerate(leaves):
        whole = torch.cat([gradients[i] for _, gradients in results]).double() / size  # what averaging leaves
        torch.testing.assert_close(whole, leaf.grad, rtol=0, atol=tolerance)


def test_a_loss_that_is_not_finite_is_so_on_every_rank() -> None:
    heads, label = batch(2, torch.float32)
    heads[1][1, 0, 0, 0] = torch.nan
    for loss, _ in processes.run(loss_and_gradients, 2, heads, label):
        assert loss.isnan()


def test_alone_it_is_the_plain_operator() -> None:
    heads, label = batch(2, torch.float32)
    loss, gradients = processes.alone(loss_and_gradients, heads, label)
    leaves = [head.clone().requires_grad_() for head in heads]
    expected = ops.powerset_loss(leaves, label, backend="portable")
    (2 * expected).backward()
    assert torch.equal(loss, expected)
    assert all(torch.equal(a, leaf.grad) for a, leaf in zip(gradients, leaves, strict=True))


def test_an_empty_batch_is_refused() -> None:
    heads, label = batch(2, torch.float32)
    with pytest.raises(ValueError, match=r"label: got shape \[0, 8, 8\], expected at least one pixel on each"):
        powerset_loss([head[:0] for head in heads], label[:0], ranks=Ranks(0, 2))
