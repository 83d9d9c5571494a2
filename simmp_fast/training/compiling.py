"""What `train.compile` needs of a machine, said before the first step or in place of a traceback."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from simmp_fast.config import ConfigError
from simmp_fast.training.errors import TrainingError

_WITHOUT = "train.compile=false does without"


def check_compiler(device: torch.device) -> None:
    """Look for what `torch.compile` calls for a device: Triton for a GPU, else a C++ compiler.

    Raises:
        ConfigError: it is not there.
    """
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            raise ConfigError(f"train.compile: got true without Triton, which it needs on a GPU; {_WITHOUT}")
        return
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler
    except ImportError:
        return  # inner workings of PyTorch, which may move: the first step finds out
    try:
        get_cpp_compiler()
    except RuntimeError as error:
        raise ConfigError(
            f"train.compile: got true without a C++ compiler, which it needs on a CPU ({error}); install g++, name one "
            f"in the environment variable CXX, or leave it: {_WITHOUT}"
        ) from None


@contextmanager
def compile_errors(step: int) -> Iterator[None]:
    """Turn an error of `torch.compile` in the block, training step `step`, into a `TrainingError`."""
    try:
        yield
    except RuntimeError as error:
        from torch._dynamo.exc import TorchDynamoException  # slow to import, and loaded by now if anything was compiled

        if not isinstance(error, TorchDynamoException):
            raise
        reason = str(error).strip().partition("\n")[0]
        raise TrainingError(
            f"step {step}: train.compile: the training step cannot be compiled ({reason}); it needs a C++ compiler on "
            f"a CPU, Triton and a C compiler such as gcc on a GPU; {_WITHOUT}"
        ) from error
