"""The processes that train one network together, and all that they say to one another.

A leaf module: operators, model and training use it, it uses only PyTorch. For one process every method is the identity
and no process group is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among those of the default process group. Every method is collective: all ranks call it together.

    Tensors travel on their own device, what the host decides on the CPU: a group for GPUs needs a CPU backend too
    (``"cpu:gloo,cuda:nccl"``). Sums are added in the order of the ranks, so all ranks hold the same bits.

    Attributes:
        rank: this process, from 0.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    def gather(self, x: Tensor) -> Tensor:
        """``[size, *x.shape]``: `x` of every rank, all of one shape and dtype."""
        if self.size == 1:
            return x.unsqueeze(0)
        parts = x.new_empty((self.size, *x.shape))
        dist.all_gather(list(parts), x.contiguous())
        return parts

    def total(self, x: Tensor) -> Tensor:
        """The sum of `x` over the ranks."""
        return x if self.size == 1 else self.gather(x).sum(0)

    def largest(self, x: Tensor) -> Tensor:
        """The elementwise maximum of `x` over the ranks."""
        return x if self.size == 1 else self.gather(x).amax(0)

    def rows(self, table: Tensor, index: Tensor) -> Tensor:
        """Rows of the tables of all ranks, seen as one table in the order of the ranks.

        Only the wanted rows travel: each rank contributes those it holds and zeros for the others.

        Args:
            table: ``[T, D]``, as long on every rank.
            index: ``[n]`` int64 in ``[0, size * T)``, the same on every rank.

        Returns:
            ``[n, D]``, the same bits on every rank.
        """
        if self.size == 1:
            return table[index]
        place = index - self.rank * table.shape[0]
        mine = (place >= 0) & (place < table.shape[0])
        found = table[place.clamp(0, table.shape[0] - 1)].where(mine.unsqueeze(1), 0)
        dist.all_reduce(found)
        return found

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag of the host: does some rank raise it?"""
        if self.size == 1:
            return flags
        raised = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(raised, dist.ReduceOp.MAX)
        return tuple(bool(flag) for flag in raised.tolist())

    def everyone(self, value: T) -> list[T]:
        """A host value of every rank, in their order; it must be possible to pickle it."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def first(self, action: Callable[[], T]) -> T:
        """What `action` returns on rank 0, which alone runs it; the others wait. An error there is raised everywhere.

        The result must be possible to pickle, and hold no tensor of a GPU.
        """
        if self.size == 1:
            return action()
        outcome: list[Any] = [None, None]
        if self.rank == 0:
            try:
                outcome[0] = action()
            except Exception as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    @torch.no_grad()
    def share(self, module: nn.Module) -> None:
        """Give the parameters and buffers of `module` the values they have on rank 0."""
        if self.size > 1:
            for tensor in [*module.parameters(), *module.buffers()]:
                dist.broadcast(tensor, 0)


ALONE = Ranks()
