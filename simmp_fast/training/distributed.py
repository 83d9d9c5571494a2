"""Training in several processes, as `torchrun` starts them: the process group, and a network made ready for it."""

from __future__ import annotations

import gc
import os
import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from simmp_fast.config import Config, ConfigError
from simmp_fast.data.cache import Cache
from simmp_fast.data.errors import DataError
from simmp_fast.model.memory import MemoryBank
from simmp_fast.parallel.batch_norm import synchronise_batch_norm
from simmp_fast.ranks import ALONE, Ranks
from simmp_fast.training import rng
from simmp_fast.training.errors import TrainingError

TIMEOUT_MINUTES = 30.0
# What PyTorch's errors say that come of an exchange, and those of them in which another process was waited for.
_EXCHANGE = ("gloo/", "Gloo", "[c10d]", "NCCL")
_SILENCE = ("timed out", "timeout")
_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def launched_rank() -> int:
    """This process's number among those that `torchrun` started; 0 without `torchrun`."""
    return int(os.environ["RANK"]) if launched() else 0


def launched() -> bool:
    """Whether `torchrun`, or what sets its variables, started this process."""
    return all(name in os.environ for name in _LAUNCHED)


@contextmanager
def join_ranks(
    device: str | torch.device | None, timeout_minutes: float = TIMEOUT_MINUTES
) -> Iterator[tuple[Ranks, torch.device]]:
    """This process's place among those that `torchrun` started, and the device it trains on.

    Without `torchrun`'s variables, or with one process, nothing is set up. Otherwise the default process group is, and
    is taken down at the end: where all went well once all are there, else at once, which ends the others' waiting.

    Args:
        device: None takes a CUDA GPU if there is one, else the CPU. Each process of a machine takes its own GPU.
        timeout_minutes: how long processes wait for one another.

    Raises:
        ConfigError: a GPU named by number, or more processes than GPUs on this machine.
        TrainingError: another process ended, or did not answer for so long.
    """
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if not launched() or os.environ["WORLD_SIZE"] == "1":
        yield ALONE, place
        return
    if place.type == "cuda":
        place = _own_gpu(place)
        torch.cuda.set_device(place)
    _connect("cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo", timeout_minutes)
    try:
        with rank_errors(timeout_minutes):
            ranks = Ranks(dist.get_rank(), dist.get_world_size())
            yield ranks, place
            ranks.any(False)  # none leaves while another still waits for what it said last
    except BaseException as error:
        _forget_locals(error)
        raise
    finally:
        _leave()


def _connect(backend: str, timeout_minutes: float) -> None:
    try:
        dist.init_process_group(backend, timeout=timedelta(minutes=timeout_minutes))
    except (RuntimeError, ValueError) as error:
        size, place = os.environ["WORLD_SIZE"], f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise TrainingError(
            f"process {os.environ['RANK']} (from 0) of {size} cannot meet the others at MASTER_ADDR:MASTER_PORT = "
            f"{place} within {timeout_minutes:g} minutes ({_reason(error)}): start all {size} with this free port, or "
            "allow more with train.rank_timeout_minutes"
        ) from error


def _reason(error: BaseException) -> str:
    """What PyTorch says: "[FILE:LINE] REASON. ADVICE", and more lines."""
    return re.sub(r"^\[[^]]*] ", "", str(error)).partition("\n")[0].partition(". ")[0]


def _leave() -> None:
    """Take the process group down.

    What still refers to it, such as the averaging of gradients, is collected first: the group's threads must end
    before Python does, and they end with the last reference.
    """
    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()


def _forget_locals(error: BaseException) -> None:
    """Let no traceback of `error` and its causes keep what refers to the process group."""
    seen: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in seen:
        traceback.clear_frames(following.__traceback__)
        seen.append(following)
        following = following.__cause__ or following.__context__


@contextmanager
def rank_errors(timeout_minutes: float) -> Iterator[None]:
    """Turn what an exchange with other processes meets, a broken connection or their silence, into `TrainingError`."""
    try:
        yield
    except TrainingError:
        raise
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and not any(part in str(error) for part in _EXCHANGE):
            raise
        reason = _reason(error)
        if any(part in reason.lower() for part in _SILENCE):
            raise TrainingError(
                f"another process did not answer for {timeout_minutes:g} minutes: it is stuck, was stopped, or needs "
                f"more time, which train.rank_timeout_minutes gives ({reason}); resume the run from its last checkpoint"
            ) from error
        raise TrainingError(
            f"the connection to another process broke: it ended, and its own messages say why ({reason}); resume the "
            "run from its last checkpoint"
        ) from error


def _own_gpu(asked: torch.device) -> torch.device:
    index, count = int(os.environ.get("LOCAL_RANK", os.environ["RANK"])), torch.cuda.device_count()
    if asked.index is not None:
        raise ConfigError(f"device: got {str(asked)!r}, expected 'cuda': each of several processes takes its own GPU")
    if index >= count:
        raise ConfigError(f"device: got process {index} (from 0) on a machine of {count} GPUs, expected one GPU each")
    return torch.device("cuda", index)


def check_ranks(config: Config, cache: Cache, ranks: Ranks) -> None:
    """Refuse what several processes cannot train as one would; all of them raise the same.

    Raises:
        ConfigError: a batch that they cannot share evenly, the released variant, or a compiled or captured step.
        DataError: they opened different data.
    """
    if ranks.size == 1:
        return
    if config.train.batch_size % ranks.size:
        raise ConfigError(
            f"train.batch_size: got {config.train.batch_size}, expected a multiple of {ranks.size}: it is shared by "
            "that many processes"
        )
    if config.model.variant == "released":
        raise ConfigError(
            "model.variant: got 'released', expected 'paper' on several processes: it treats the first image of a "
            "batch in its own way, and each process would take its own first image for it"
        )
    for key in ("compile", "cuda_graph"):
        if getattr(config.train, key):
            raise ConfigError(
                f"train.{key}: got true, expected false on several processes: a step that exchanges with others was "
                "never compiled or captured"
            )
    checksums = ranks.everyone(cache.checksum)
    if len(set(checksums)) > 1:
        raise DataError(f"{cache.folder}: got caches of different content on the processes, expected one: {checksums}")


def prepare_model(model: nn.Module, ranks: Ranks) -> None:
    """Give a network on several ranks the state of rank 0, and memory banks and batch norms that see all batches."""
    if ranks.size == 1:
        return
    for module in model.modules():
        if isinstance(module, MemoryBank):
            module.ranks = ranks
    synchronise_batch_norm(model, ranks)
    ranks.share(model)


def share_random_state(ranks: Ranks) -> None:
    """Give this rank the random state of rank 0: dropout in the backbone's position biases is one mask for a batch."""
    if ranks.size == 1:
        return
    states = ranks.first(rng.capture)
    # Rank 0 trains on its first GPU, every other rank on one of its own.
    rng.restore({**states, "cuda": states["cuda"][:1] * torch.cuda.device_count()})


def gradients_across(model: nn.Module, device: torch.device, ranks: Ranks) -> Callable[..., Any]:
    """The forward pass of `model` whose gradients are averaged over the ranks; `model` itself on one."""
    if ranks.size == 1:
        return model
    averaged = DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        init_sync=False,  # `prepare_model` has done so, buffers included
    )
    # Banks and running statistics are equal by what they are computed from. The argument has two names by version.
    averaged.broadcast_buffers = False
    return averaged
