"""Work in processes of its own: compilers abort, and a kernel that fails takes its CUDA context along."""

from __future__ import annotations

import math
import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

Item = TypeVar("Item")

# Forked from a process that has imported everything and never touches the GPU.
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["simmp_fast.kernels.measure"])
# The seconds that one item may take.
PATIENCE = 180.0


def isolated(function: Callable[..., Any], *arguments: Any, seconds: float = PATIENCE) -> Any:
    """Call a function in a process of its own.

    Returns:
        its result; in words what became of it where it raised, took too long, or ended its process.
    """
    return next(answer for _, answer in one_by_one(_once, [arguments], function, seconds=seconds))


def _once(items: Iterable[tuple[Any, ...]], function: Callable[..., Any]) -> Iterator[Any]:
    for arguments in items:
        yield function(*arguments)


def one_by_one(
    function: Callable[..., Iterable[Any]],
    items: Sequence[Item],
    *arguments: Any,
    seconds: float = PATIENCE,
    end: float = math.inf,
) -> Iterator[tuple[Item, Any]]:
    """What ``function(items, *arguments)`` yields, one answer an item, from a process of its own.

    Where an item raises, takes too long or ends the process, its answer is what became of it, in words, and a new
    process goes on with the next: one bad item costs no other.

    Args:
        function: a generator function that a new process can import.
        items: what it takes first, all that are left.
        arguments: what it takes after them.
        seconds: that one item may take.
        end: time of `time.monotonic` at which all stops, in the midst of an item.

    Yields:
        item and answer, in order.
    """
    left = list(items)
    while left and time.monotonic() < end:
        receiver, sender = _PROCESSES.Pipe(duplex=False)
        process = _PROCESSES.Process(target=_answer, args=(sender, function, left, arguments), daemon=True)
        process.start()
        sender.close()
        try:
            alive = True
            while alive and left:
                wait = min(seconds, end - time.monotonic())
                if wait <= 0:
                    return
                if receiver.poll(wait):
                    alive, answer = _received(receiver, process)
                elif wait < seconds:
                    return
                else:
                    alive, answer = False, f"takes more than {seconds:g} seconds"
                yield left.pop(0), answer
        finally:
            process.kill()
            process.join()


def _received(receiver: Any, process: Any) -> tuple[bool, Any]:
    """Whether the process goes on, and its answer."""
    try:
        found: tuple[bool, Any] = receiver.recv()
    except EOFError:
        process.join()
        return False, f"ends its process (exit status {process.exitcode})"
    return found


def _answer(sender: Any, function: Callable[..., Iterable[Any]], items: Any, arguments: tuple[Any, ...]) -> None:
    try:
        for answer in function(items, *arguments):
            sender.send((True, answer))
    except Exception as error:
        sender.send((False, f"does not run ({type(error).__name__}: {error})".splitlines()[0][:200]))
