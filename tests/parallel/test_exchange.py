"""What several ranks say to one another: how much, and that nobody waits for the device to say it."""

from __future__ import annotations

import processes
import pytest
import torch
from no_sync import NoHostSync
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from simmp_fast.parallel.batch_norm import synchronise_batch_norm
from simmp_fast.parallel.powerset_loss import powerset_loss
from simmp_fast.parallel.update_memory import update_memory
from simmp_fast.ranks import ALONE, Ranks

CLUSTERS, SLOTS, DIM, CLASSES = 3, 5, 7, 4


class Traffic(TorchDispatchMode):
    """Counts the elements that this rank hands to collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            # An all-gather names its outputs first; what a rank gives is its last list of tensors.
            given = tree_leaves(args[1] if "allgather" in str(func) else args[0])
            self.elements += sum(leaf.numel() for leaf in given if isinstance(leaf, Tensor))
        return func(*args, **(kwargs or {}))


def one_of_each(ranks: Ranks, side: int) -> None:
    """A memory update, a warm-up exchange, a loss and a batch norm, on maps of `side` pixels."""
    torch.manual_seed(ranks.rank)
    tokens = torch.randn(2, side * side, DIM)
    memory = torch.rand(CLUSTERS, SLOTS, DIM, generator=torch.Generator().manual_seed(0))
    update_memory(tokens, memory, memory.mean(1), torch.tensor(3), backend="portable", ranks=ranks)
    ranks.rows(tokens.flatten(0, 1), torch.arange(CLUSTERS * SLOTS))
    head = torch.randn(2, CLASSES, side, side, requires_grad=True)
    powerset_loss([head], torch.zeros(2, side, side).long(), backend="portable", ranks=ranks).backward()
    norm = nn.Sequential(nn.BatchNorm2d(CLASSES))
    synchronise_batch_norm(norm, ranks)
    norm(head).sum().backward()


def measured(ranks: Ranks) -> list[int]:
    one_of_each(ranks, 4)  # gloo connects at the first call
    counts = []
    for side in (4, 8):
        with Traffic() as traffic:
            one_of_each(ranks, side)
        counts.append(traffic.elements)
    return counts


def test_traffic_does_not_grow_with_tokens_and_pixels() -> None:
    statistics = CLUSTERS + 2 * CLUSTERS * DIM  # token counts; peaks and sums of the softmax
    update = statistics + 2 * CLUSTERS * SLOTS + CLUSTERS * SLOTS * DIM  # scores and repetitions; tokens written
    warmup, loss, norm = CLUSTERS * SLOTS * DIM, 2 * (2 * CLASSES + 1), 4 * CLASSES
    for counts in processes.run(measured, 2):
        assert counts == [update + warmup + loss + norm] * 2


def unsynchronised(ranks: Ranks) -> None:
    one_of_each(ranks, 4)
    with NoHostSync():
        one_of_each(ranks, 4)


def test_nothing_waits_for_the_device() -> None:
    processes.run(unsynchronised, 2)


def exchanged(ranks: Ranks) -> list[object]:
    table = torch.arange(6, dtype=torch.bfloat16).view(3, 2) + 10 * ranks.rank
    broken = []
    try:
        ranks.first(lambda: {}["missing"])
    except KeyError as error:
        broken = [str(error)]
    return [
        ranks.gather(torch.tensor(ranks.rank)).tolist(),
        ranks.total(torch.tensor([1.0, 10.0 * ranks.rank])).tolist(),
        ranks.largest(torch.tensor([-1.0 * ranks.rank, 5.0])).tolist(),
        ranks.rows(table, torch.tensor([5, 0, 3])).tolist(),
        ranks.any(ranks.rank == 1, False),
        ranks.everyone(f"rank {ranks.rank}"),
        ranks.first(lambda: ranks.rank),
        broken,
    ]


def test_what_each_call_returns() -> None:
    expected = [
        [0, 1], [2.0, 10.0], [0.0, 5.0], [[14.0, 15.0], [0.0, 1.0], [10.0, 11.0]], (True, False), ["rank 0", "rank 1"],
        0, ["'missing'"],
    ]  # fmt: skip
    assert processes.run(exchanged, 2) == [expected, expected]


def test_alone_every_call_is_the_identity() -> None:
    x = torch.rand(3, 2)
    assert torch.equal(ALONE.gather(x), x.unsqueeze(0))
    assert ALONE.total(x) is x
    assert ALONE.largest(x) is x
    assert torch.equal(ALONE.rows(x, torch.tensor([2, 0])), x[[2, 0]])
    assert ALONE.any(True, False) == (True, False)
    assert ALONE.everyone(5) == [5]
    assert ALONE.first(lambda: 7) == 7
    with pytest.raises(KeyError):
        ALONE.first(lambda: {}["missing"])
