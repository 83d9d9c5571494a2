"""Training in several processes, as `torchrun` starts them: the process group, and a network made ready for it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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

_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def launched_rank() -> int:
    """This process's number among those that `torchrun` started; 0 without `torchrun`."""
    return int(os.environ["RANK"]) if _launched() else 0


def _launched() -> bool:
    return all(name in os.environ for name in _LAUNCHED)


@contextmanager
def join_ranks(device: str | torch.device | None) -> Iterator[tuple[Ranks, torch.device]]:
    """This process's place among those that `torchrun` started, and the device it trains on.

    Without `torchrun`'s variables, or with one process, nothing is set up. Otherwise the default process group is, and
    is taken down at the end; a process that fails leaves it to its exit, which ends the others' waiting.

    Args:
        device: None takes a CUDA GPU if there is one, else the CPU. Each process of a machine takes its own GPU.

    Raises:
        ConfigError: a GPU named by number, or more processes than GPUs on this machine.
    """
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if not _launched() or os.environ["WORLD_SIZE"] == "1":
        yield ALONE, place
        return
    if place.type == "cuda":
        place = _own_gpu(place)
        torch.cuda.set_device(place)
    dist.init_process_group("cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo")
    yield Ranks(dist.get_rank(), dist.get_world_size()), place
    dist.destroy_process_group()


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
