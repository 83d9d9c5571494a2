"""A stand-in for CUDA graphs on a CPU: what a function asked of the device is asked again, on the very same tensors.

Like a graph, a replay runs no line of the host's code: a number that the host computed is a constant of the tape, and a
tensor that it made afresh for every step would be that of the capture for ever.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from no_sync import NoHostSync
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Entry = tuple[Any, tuple, dict[str, Any], Any]


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class _Recording(TorchDispatchMode):
    """Notes every call, and what the tensors that were there before held."""

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[Entry] = []
        self.before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
        self._made: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        for tensor in _tensors((args, kwargs)):
            address = _address(tensor)
            if address not in self._made and address not in self.before:
                storage = tensor.untyped_storage()
                self.before[address] = (storage, storage.clone())
        result = func(*args, **kwargs)
        self._made |= {_address(tensor) for tensor in _tensors(result)} - self.before.keys()
        self.entries.append((func, args, kwargs, result))
        return result


class TapeRecorder:
    """The interface of `simmp_fast.training.replay.Recorder`.

    Attributes:
        captures: functions captured so far.
        replays: replays so far.
    """

    def __init__(self) -> None:
        self.captures = self.replays = 0

    def run(self, call: Callable[[], Tensor]) -> Tensor:
        return call()

    def settle(self) -> None:
        """Nothing runs by itself here."""

    def reclaim(self) -> None:
        """A tape that nobody holds is gone."""

    def capture(self, call: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self.captures += 1
        generator = torch.get_rng_state()
        with NoHostSync(), _Recording() as tape:
            result = call()
        # A capture carries nothing out: what it changed is as before.
        torch.set_rng_state(generator)
        for storage, content in tape.before.values():
            storage.copy_(content)

        def replay() -> Tensor:
            self.replays += 1
            with torch.no_grad():
                for entry in tape.entries:
                    _again(*entry)
            return result.clone()

        return replay


def _again(func: Any, args: tuple, kwargs: dict[str, Any], known: Any) -> None:
    """Make a call once more; its results go where those of the first time lie."""
    inputs = {_address(tensor) for tensor in _tensors((args, kwargs))}
    for old, new in zip(_tensors(known), _tensors(func(*args, **kwargs)), strict=True):
        if _address(old) not in inputs:
            old.copy_(new)
