"""SIGINT and SIGTERM as a request to stop at a good moment."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """While entered, the first SIGINT or SIGTERM sets `requested`; the second one acts as if this were not here.

    Signals reach only the main thread; elsewhere nothing is installed and `requested` stays False.
    """

    def __init__(self) -> None:
        self.requested = False
        self._raise_now = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self._restore()
        if self._raise_now:
            raise KeyboardInterrupt

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """A block that changes no state of the training, such as validation: a signal ends it where it stands."""
        self._raise_now = True
        try:
            yield
        except KeyboardInterrupt:
            if not self.requested:
                raise
        finally:
            self._raise_now = False
