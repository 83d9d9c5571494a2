"""What a label outside of the classes and a cluster outside of the bank must come to in an implementation: NaN."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

OUTSIDE = (-1, 3, 255, -(2**40), 2**32)  # of 3 classes or clusters; the last is 0 in 32 bits
WEIGHTS: tuple[dict[str, float], ...] = ({}, {"ce_weight": 0.0}, {"dice_weight": 0.0})


def _random(*shape: int, seed: int, device: str) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def _bank(device: str) -> tuple[Tensor, Tensor]:
    return _random(3, 5, 8, seed=1, device=device), _random(3, 8, seed=2, device=device)


def _clusters(device: str) -> Tensor:
    return torch.arange(12, device=device).view(2, 6) % 3


def check_loss(implementation: Any, outside: int, weights: dict[str, float], device: str = "cpu") -> None:
    """The loss is NaN, and so is every number of every gradient; without the bad label all are finite."""
    label = torch.arange(2 * 8 * 8, device=device).view(2, 8, 8) % 3
    for bad in (False, True):
        heads = [_random(2, 3, side, side, seed=side, device=device).requires_grad_() for side in (8, 2)]
        if bad:
            label[1, 7, 3] = outside
        loss = implementation.powerset_loss(heads, label, **weights)
        gradients = torch.autograd.grad(loss, heads)
        assert bool(loss.isnan()) == bad
        assert all(bool(g.isnan().all() if bad else g.isfinite().all()) for g in gradients)


def check_attention(implementation: Any, operator: str, outside: int, device: str = "cpu") -> None:
    """The token has NaN, and its query a gradient of NaN; nothing else of the batch changes."""
    leaves = [_random(2, 6, 8, seed=10 + i, device=device).requires_grad_() for i in range(3)]
    leaves = leaves[:1] if operator == "memory_attention" else leaves
    results = []
    for place in (None, (1, 4)):
        cluster = _clusters(device)
        if place is not None:
            cluster[place] = outside
        output, found = getattr(implementation, operator)(*leaves, *_bank(device), cluster)
        assert torch.equal(found, cluster)
        results.append([output.detach(), *torch.autograd.grad(output.sum(), leaves)])
    for name, clean, spoiled in zip(("output", "query", "key", "value"), *results, strict=False):
        if name in ("output", "query"):
            assert spoiled[1, 4].isnan().all()
            spoiled[1, 4] = clean[1, 4]
        torch.testing.assert_close(spoiled, clean)


def check_update(implementation: Any, outside: int, device: str = "cpu") -> None:
    """All of the new bank is NaN, and the old one is as it was."""
    memory, prototypes = _bank(device)
    tokens, cluster = _random(2, 6, 8, seed=0, device=device), _clusters(device)
    results = implementation.update_memory(tokens, memory, prototypes, 2, cluster=cluster)
    assert all(bool(x.isfinite().all()) for x in results)
    cluster[0, 0] = outside
    results = implementation.update_memory(tokens, memory, prototypes, 2, cluster=cluster)
    assert all(bool(x.isnan().all()) for x in results)
    assert torch.equal(memory, _bank(device)[0])
