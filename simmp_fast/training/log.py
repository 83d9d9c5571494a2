"""What a run says: metrics as JSON lines and TensorBoard events, a text log, and progress on a terminal."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

from simmp_fast.console import Console
from simmp_fast.data.errors import DataError, reading
from simmp_fast.messages import printable, why_no_file
from simmp_fast.training.errors import TrainingError

_ROW = '{"kind": '  # how each row begins


class RunLog:
    """The records of one run. On a terminal a progress bar shows rate and time left; elsewhere only lines are printed.

    Args:
        folder: the run folder.
        total_steps: steps of the whole run.
        step: steps already taken.
        metrics_bytes: length that `metrics.jsonl` had then; whatever follows is cut off, so that a resumed run leaves
            the same rows as one that was never interrupted.
        metrics_sha256: checksum of what it held then.

    Raises:
        DataError: `metrics.jsonl` is shorter than that, or held something else.
        TrainingError: a file cannot be opened.
    """

    def __init__(
        self, folder: Path, *, total_steps: int, step: int = 0, metrics_bytes: int = 0, metrics_sha256: str = ""
    ) -> None:
        self.path = folder / "metrics.jsonl"
        self._hash = check_metrics(self.path, metrics_bytes, metrics_sha256)
        self._console: Any = Console(sys.stderr)
        with _mendable(folder):
            # Unbuffered: nothing is left to be written, and to fail, when they are closed.
            self._metrics = open(self.path, "ab", buffering=0, opener=_at_once)  # noqa: SIM115
            self._metrics.truncate(metrics_bytes)
            self._metrics.seek(metrics_bytes)
            self._text = open(folder / "train.log", "ab", buffering=0, opener=_at_once)  # noqa: SIM115
            # Before TensorBoard's thread starts; where that fails it stays, for the thread may end later.
            self._thread_hook, threading.excepthook = threading.excepthook, self._thread_ended
            self._board = _tensorboard(folder / "tensorboard", step)
        self._bar = tqdm(
            total=total_steps,
            initial=step,
            unit="step",
            dynamic_ncols=True,
            file=self._console,
            disable=not self._console.isatty(),
        )

    def _thread_ended(self, error: threading.ExceptHookArgs) -> None:
        """Say in a line, and not in a traceback, that TensorBoard's own thread could not write."""
        if isinstance(error.exc_value, OSError) and type(error.thread).__module__.startswith("tensorboard."):
            reason = error.exc_value.strerror or error.exc_value
            board = self.path.with_name("tensorboard")
            self.say(f"{board}: cannot be written ({reason}); {self.path.name} has all rows")
        else:
            self._thread_hook(error)

    def say(self, message: str) -> None:
        """One line for people: to the text log with the time, and to the terminal."""
        tqdm.write(printable(message), file=self._console)
        with contextlib.suppress(OSError):  # a full disk must not hide the message that says so
            self._text.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {printable(message)}\n".encode())

    def row(self, kind: str, step: int, epoch: int, **values: Any) -> None:
        """One line of `metrics.jsonl`; its numbers also go to TensorBoard as ``kind/name``.

        Args:
            kind: "train", "epoch" or "validation".
            step: training steps taken.
            epoch: 0-based.
            values: numbers and strings; a number that is not finite becomes null.

        Raises:
            TrainingError: the disk is full.
        """
        finite = {name: _finite(value) for name, value in values.items()}
        row = {"kind": kind, "step": step, "epoch": epoch, **finite, "time": round(time.time(), 3)}
        line = json.dumps(row).encode() + b"\n"
        with _mendable(self.path):
            if self._metrics.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._hash.update(line)
            if self._board is not None:
                for name, value in finite.items():
                    if isinstance(value, (int, float)):
                        self._board.add_scalar(f"{kind}/{name}", value, step)

    def advance(self) -> None:
        """Count one step on the progress bar."""
        self._bar.update()

    def note(self, **values: str) -> None:
        """Show short values at the end of the progress bar."""
        self._bar.set_postfix(values, refresh=False)

    def synced(self) -> tuple[int, str]:
        """Length and SHA-256 of `metrics.jsonl`, once all of it is on the disk.

        Raises:
            TrainingError: the disk is full.
        """
        with _mendable(self.path):
            os.fsync(self._metrics.fileno())
        return self._metrics.tell(), self._hash.hexdigest()

    def close(self) -> None:
        """Close all files.

        Raises:
            TrainingError: the last rows could not be written.
        """
        self._bar.close()
        if self._board is not None:
            with contextlib.suppress(OSError):
                self._board.close()
        threading.excepthook = self._thread_hook
        with contextlib.suppress(OSError):
            self._text.close()
        with _mendable(self.path):
            self._metrics.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with contextlib.suppress(*([] if kind is None else [TrainingError])):  # the first error says more
            self.close()


class SilentLog(RunLog):
    """The log of a process that keeps none: one of several that train together, but not the first."""

    def __init__(self) -> None:
        pass

    def say(self, message: str) -> None:
        """Nothing."""

    def advance(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


@contextlib.contextmanager
def _mendable(path: Path) -> Iterator[None]:
    """Turn an `OSError` of the block into a `TrainingError` that names the file."""
    try:
        yield
    except OSError as error:
        raise TrainingError(
            f"{os.fsdecode(error.filename or path)}: cannot be written ({error.strerror or error}); "
            "checkpoints are untouched, so resume the run when that is mended"
        ) from error


def _at_once(path: str, flags: int) -> int:
    """Open a file; for a pipe that nobody reads, which would wait for ever, that is an `OSError`."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0), 0o666)


def _finite(value: Any) -> Any:
    """None for NaN and infinities, which JSON does not have."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_metrics(path: Path, length: int, sha256: str) -> Any:
    """Compare the first `length` bytes of a `metrics.jsonl` with what the checkpoint knows of them.

    Returns:
        Their running checksum, a `hashlib` object, to go on with.

    Raises:
        DataError: they are fewer, or others.
    """
    head = b""
    if length and (why := why_no_file(path)):
        raise DataError(f"{path}: {why}; restore it, or remove it, and the run goes on without its rows")
    if length:
        with reading(path), open(path, "rb") as file:
            head = file.read(length)
    known = "restore it, or remove it, and the run goes on without its rows"
    if len(head) < length:
        raise DataError(f"{path}: got {len(head)} bytes, expected the {length} the checkpoint knows of; {known}")
    found = hashlib.sha256(head)
    if length and found.hexdigest() != sha256:
        raise DataError(
            f"{path}: got other rows than the run wrote: the first {length} bytes have SHA-256 "
            f"{found.hexdigest()[:12]}, expected {sha256[:12]}; {known}"
        )
    return found


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`. The beginning of a row at its end, of a process that died as it wrote, is none.

    Raises:
        DataError: the file is missing or a line is no JSON object.
    """
    path = Path(path)
    if why := why_no_file(path):
        raise DataError(f"{path}: {why}")
    try:
        *lines, last = path.read_text(encoding="utf-8").split("\n")
        cut_off = last[: len(_ROW)] == _ROW[: len(last)]
        rows = [json.loads(line) for line in (lines if cut_off else [*lines, last])]
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: a line is no JSON ({error})") from None
    for row in rows:
        if not isinstance(row, dict):
            raise DataError(f"{path}: got the line {row!r:.100}, expected a JSON object")
    return rows


def _tensorboard(folder: Path, step: int) -> Any:
    """A TensorBoard writer, or None where TensorBoard is not installed; its events after `step` are void."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=step + 1)
