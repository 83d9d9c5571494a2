"""Functions run by several processes at once, on the CPU; they end in time or are killed."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from simmp_fast.ranks import ALONE, Ranks

# A server that has imported the package forks the processes: importing takes longer than most tests.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["simmp_fast.training.loop", "simmp_fast.parallel.batch_norm", "sklearn.cluster"])


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def start(function: Callable[..., Any], size: int, *arguments: Any) -> list[tuple[Any, Any]]:
    """`function(*arguments)` begun in `size` processes with the variables of `torchrun`; process and pipe of each."""
    port, started = free_port(), []
    job = pickle.dumps((function, arguments))  # not left to the pipes, which would share the tensors' memory
    for rank in range(size):
        ours, theirs = _CONTEXT.Pipe()
        variables = {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }  # fmt: skip
        process = _CONTEXT.Process(target=_enter, args=(theirs, variables, job), daemon=True)
        process.start()
        theirs.close()
        started.append((process, ours))
    return started


def finish(started: list[tuple[Any, Any]], seconds: float = 90) -> list[Any]:
    """What each process returned, or the traceback (a string) of one that failed.

    Raises:
        AssertionError: a process did not end in time; all are killed.
    """
    end = time.monotonic() + seconds
    results = []
    try:
        for rank, (process, pipe) in enumerate(started):
            assert pipe.poll(max(0.0, end - time.monotonic())), f"rank {rank} did not end within {seconds} s"
            try:
                results.append(pickle.loads(pipe.recv_bytes()))
            except EOFError:
                process.join(5)
                results.append(f"ended with exit code {process.exitcode}")
        return results
    finally:
        for process, pipe in started:
            process.join(0.5)
            process.kill()
            process.join()
            pipe.close()


def run(function: Callable[..., Any], size: int, *arguments: Any) -> list[Any]:
    """What `function(ranks, *arguments)` returns in each of `size` processes that form a gloo group."""
    results = finish(start(_grouped, size, function, arguments))
    failed = [f"rank {rank}: {result}" for rank, result in enumerate(results) if isinstance(result, str)]
    assert not failed, "\n".join(failed)
    return results


def together(function: Callable[..., Any], size: int, *arguments: Any) -> list[Any]:
    """`run`, checked to give the same bits on every rank; returns the tensors of one."""
    first, *others = run(function, size, *arguments)
    for other in others:
        assert len(first) == len(other)
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    return first


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """What `function` returns in this process, for all the data."""
    return function(ALONE, *arguments)


def _enter(pipe: Any, variables: dict[str, str], job: bytes) -> None:
    os.environ.update(variables)
    torch.set_num_threads(1)
    try:
        function, arguments = pickle.loads(job)
        result = function(*arguments)
    except BaseException:
        result = traceback.format_exc()
    pipe.send_bytes(pickle.dumps(result))
    pipe.close()


def _grouped(function: Callable[..., Any], arguments: tuple) -> Any:
    dist.init_process_group("gloo")
    try:
        return function(Ranks(dist.get_rank(), dist.get_world_size()), *arguments)
    finally:
        dist.destroy_process_group()
