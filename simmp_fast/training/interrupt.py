"""SIGINT, SIGTERM and SIGHUP as a request to stop at a good moment."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self, TypeVar

from simmp_fast.signals import STOP_SIGNALS
from simmp_fast.training.distributed import launched

T = TypeVar("T")


class StopRequest:
    """While entered, SIGINT, SIGTERM and SIGHUP set `requested`; a second SIGINT (Ctrl-C twice) acts at once.

    However often they come, SIGTERM and SIGHUP only ask: systemd sends one after the other, and the processes of a
    batch job get what the whole job got and what their launcher passes on. For the latter reason SIGINT only asks in
    processes that `torchrun` started, which kills them after 30 seconds.

    A signal that is ignored, as `nohup` does with SIGHUP and a shell with SIGINT for jobs in the background, stays so.
    Signals reach only the main thread; elsewhere nothing is installed and `requested` stays False.
    """

    def __init__(self) -> None:
        self.requested = False
        self._interrupts = 0
        self._raise_now = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            # None is a handler that is not Python's, and could not be put back.
            found = {number: signal.getsignal(number) for number in STOP_SIGNALS}
            self._before = {number: old for number, old in found.items() if old not in (signal.SIG_IGN, None)}
            for number in self._before:
                signal.signal(number, self._receive)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        first, self.requested = not self.requested, True
        self._interrupts += number == signal.SIGINT
        if self._insisted() or (first and self._raise_now):
            raise KeyboardInterrupt

    def _insisted(self) -> bool:
        return self._interrupts > 1 and not launched()

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """A block that changes no state of the training, such as validation: a signal ends it where it stands."""
        self._raise_now = True
        try:
            yield
        except KeyboardInterrupt:
            if not self.requested or self._insisted():
                raise
        finally:
            self._raise_now = False

    def unless_stopped(self, action: Callable[[], T]) -> T | None:
        """What `action` returns; None if a signal asked to stop before, or while it ran, which ends it where it stands.

        It must change no state of the training, as validation does.
        """
        result = None
        with self.at_once():
            if not self.requested:  # asked within the block: nothing can come between
                result = action()
        return result

    def each(self, items: Iterable[T]) -> Iterator[T]:
        """`items` until a signal asks to stop, also while the next one is waited for."""
        iterator = iter(items)
        while (item := self.unless_stopped(lambda: next(iterator, None))) is not None:
            yield item
