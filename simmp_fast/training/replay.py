"""A training step replayed from a CUDA graph: the host starts it with one call in place of thousands.

A capture records what a function asks of the device, at which addresses; a replay does it again there. So all that
changes from step to step lies in tensors that stay where they are, and what the host decides is part of a key: another
key is another graph.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Protocol

import torch
from torch import Tensor

from simmp_fast.training.errors import TrainingError

Call = Callable[[], Tensor]
# Steps of a key before its capture: compiled code, the kernels' binaries and libraries' choices are there by then.
EAGER_CALLS = 3


class Recorder(Protocol):
    """How a function is run, captured and given free on a device."""

    def run(self, call: Call) -> Tensor:
        """Call the function as it is."""

    def capture(self, call: Call) -> Call:
        """Capture the function, without carrying it out; the result does that, at every call."""

    def settle(self) -> None:
        """Wait until no replay is at work, before a capture is dropped."""

    def reclaim(self) -> None:
        """Give back what dropped captures held."""


class CudaRecorder:
    """CUDA graphs on one device. Every call, captured or not, runs in one side stream, as a capture demands.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def run(self, call: Call) -> Tensor:
        """Call the function in the side stream; the current stream waits for it, the host does not."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            result = call()
        current.wait_stream(self.stream)
        return result

    def capture(self, call: Call) -> Call:
        """Capture the function; a replay returns a copy of its result, which lives until the next one.

        Raises:
            TrainingError: the function does what no graph can hold, such as waiting for the device.
        """
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()  # the graph has a memory of its own
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                result = call()
        except Exception as error:
            raise TrainingError(
                f"train.cuda_graph: the training step cannot be captured ({error}); train.cuda_graph=false does without"
            ) from error

        def replay() -> Tensor:
            graph.replay()
            return result.clone()

        return lambda: self.run(replay)

    def settle(self) -> None:
        """Wait for the device."""
        torch.cuda.synchronize(self.device)

    def reclaim(self) -> None:
        """Give back the memory of dropped graphs, which no other allocation could take."""
        torch.cuda.empty_cache()


class Replays:
    """Runs a function `EAGER_CALLS` times as it is, then captures it and replays it, until the key changes.

    Args:
        recorder: how functions are run and captured.

    Attributes:
        replaying: whether the last call was a replay.
    """

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self._key: Hashable = None
        self._calls = 0
        self._replay: Call | None = None

    @property
    def replaying(self) -> bool:
        return self._replay is not None

    def __call__(self, key: Hashable, call: Call) -> Tensor:
        """Carry the function out.

        Args:
            key: everything that the host decides in `call`; the function of an equal key does the same.
            call: reads and writes tensors at addresses that stay; returns a tensor of its own.
        """
        if key != self._key:
            if self._replay is not None:
                self.recorder.settle()
                self._replay = None
                self.recorder.reclaim()
            self._key, self._calls = key, 0
        if self._replay is None and self._calls == EAGER_CALLS:
            self._replay = self.recorder.capture(call)
        if self._replay is not None:
            return self._replay()
        self._calls += 1
        return self.recorder.run(call)
