"""Where a training step spends its time: a clock whose stretches each belong to exactly one part.

Modules are wrapped: entering and leaving their forward pass moves the clock, and identity functions in the graph do so
when the backward pass comes by. A part inside another (a DMW-LA block of the decoder) takes its own time out of it, and
what belongs to no part is "other", so the parts always add up to the step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from simmp_fast import ops
from simmp_fast.model.dmwla import DMWLABlock
from simmp_fast.model.dsgim import DSGIM
from simmp_fast.training.step import TrainStep

from .cases import PARTS
from .timing import Clock

OTHER = PARTS[-1]


class PartClock:
    """Stretches of time by part, in the order in which they pass.

    Attributes:
        clock: marks the points in time.
    """

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self._open = [OTHER]
        self._marks: list[tuple[str, Any]] = []

    def start(self) -> None:
        """Forget what was measured; time that passes from here on is "other" until a part is entered."""
        self._open, self._marks = [OTHER], []
        self._mark()

    def enter(self, part: str) -> None:
        """A part begins, inside the one that is open."""
        self._open.append(part)
        self._mark()

    def leave(self, part: str) -> None:
        """The open part ends; where a backward pass ends out of order, everything opened inside it ends too."""
        if part in self._open:
            while self._open.pop() != part:
                pass
        if not self._open:
            self._open = [OTHER]
        self._mark()

    def rest(self) -> None:
        """All open parts end."""
        self._open = [OTHER]
        self._mark()

    def _mark(self) -> None:
        self._marks.append((self._open[-1], self.clock.mark()))

    def stop(self) -> dict[str, float]:
        """Milliseconds by part since `start`; waits for the device."""
        self._mark()
        self.clock.wait()
        found = dict.fromkeys(PARTS, 0.0)
        for (part, begin), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            found[part] += self.clock.between(begin, end)
        return found


class _Passing(torch.autograd.Function):
    """The identity; calls `notice` when its gradient comes by."""

    @staticmethod
    def forward(ctx: Any, notice: Callable[[], None], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.notice = notice
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        ctx.notice()
        return (None, *grads)


def _watched(value: Any, notice: Callable[[], None]) -> Any:
    """`value` with its tensors that carry a gradient sent through one identity."""
    leaves, shape = tree_flatten(value)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
    if places:
        passed = _Passing.apply(notice, *(leaves[i] for i in places))
        for i, tensor in zip(places, passed, strict=True):
            leaves[i] = tensor
    return tree_unflatten(leaves, shape)


def wrap(call: Callable[..., Any], part: str, clock: PartClock) -> Callable[..., Any]:
    """`call`, whose forward and backward passes belong to `part`."""

    def timed(*arguments: Any, **named: Any) -> Any:
        # The backward pass comes from the other side: it enters by the outputs and leaves by the inputs.
        arguments = tuple(_watched(argument, lambda: clock.leave(part)) for argument in arguments)
        clock.enter(part)
        result = call(*arguments, **named)
        clock.leave(part)
        return _watched(result, lambda: clock.enter(part))

    return timed


@contextlib.contextmanager
def by_part(step: TrainStep, clock: PartClock) -> Iterator[None]:
    """Let the pieces of a training step move the clock."""
    model = step.model
    pieces: list[tuple[Any, str, str]] = [
        (model.adapter, "forward", "backbone"),
        (model.backbone, "forward", "backbone"),
    ]
    pieces += [(module, "forward", "dmwla") for module in model.modules() if isinstance(module, DMWLABlock)]
    pieces += [(module, "forward", "dsgim") for module in model.modules() if isinstance(module, DSGIM)]
    pieces += [(model.decoder, "forward", "decoder"), (ops, "powerset_loss", "loss")]
    pieces += [(model, "write_memory", "memory_update")]
    pieces += [(step.optimizer, name, "optimiser") for name in ("zero_grad", "step")]
    with contextlib.ExitStack() as stack:
        for owner, name, part in pieces:
            stack.enter_context(_replaced(owner, name, wrap(getattr(owner, name), part, clock)))
        check = step.guard.check

        def rested(*arguments: Any) -> Tensor:
            clock.rest()  # the backward pass is over, whatever it left open
            return check(*arguments)

        stack.enter_context(_replaced(step.guard, "check", rested))
        yield


@contextlib.contextmanager
def _replaced(owner: Any, name: str, call: Callable[..., Any]) -> Iterator[None]:
    """An attribute replaced for a while; one that came from the class shows from there again."""
    own = vars(owner).get(name)
    setattr(owner, name, call)
    try:
        yield
    finally:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)
