"""Batches of slices from a cache: shuffled and augmented the same way whenever, and with however many processes."""

from __future__ import annotations

import atexit
import contextlib
import copy
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from simmp_fast.data.augment import augment as augment_sample
from simmp_fast.data.cache import Cache
from simmp_fast.data.errors import DataError
from simmp_fast.data.formats import Array
from simmp_fast.signals import ignore, postponed

Batch = tuple[Tensor, Tensor]

# Tags that keep the two kinds of draws apart.
_ORDER, _SAMPLE = 1, 2

_SHARED = Path("/dev/shm")  # where the batches of loading processes lie on Linux
_PREFETCH = 2  # batches that each of them makes ahead
_PATIENCE = 1.0  # seconds that one has to end by itself when its batches are no longer wanted
_ADVICE = "set train.workers to 0 or to less, make batches smaller, or give a container more (docker run --shm-size=1g)"
_LOST = ("DataLoader worker", "Pin memory thread", "Too many open files")


class _Batches(Dataset[Batch | DataError]):
    """Item `i` is batch `i` of an epoch, or the error that it met: raised in a loading process, it would lose its text
    in a traceback.
    """

    def __init__(self, cache: Cache, batches: list[Array], seed: int, epoch: int, augment: bool) -> None:
        self._cache, self._batches = cache, batches
        self._seed, self._epoch, self._augment = seed, epoch, augment

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> Batch | DataError:
        try:
            batch = self._load(index)
        except DataError as error:
            return error
        return batch if get_worker_info() is None else _shared(batch)

    def _load(self, index: int) -> Batch:
        cache, positions = self._cache, self._batches[index]
        side = cache.image_size
        images = np.empty((len(positions), cache.channels, side, side), np.float32)
        labels = np.empty((len(positions), side, side), np.int64)
        for place, position in enumerate(positions):
            image, label = cache.slice_at(int(position))
            if self._augment:
                rng = np.random.default_rng((self._seed, self._epoch, _SAMPLE, int(position)))
                image, label = augment_sample(image, label, rng)
            images[place], labels[place] = image, label
        images *= np.float32(cache.image_scale)
        return torch.from_numpy(images), torch.from_numpy(labels)


def _shared(batch: Batch) -> Batch | DataError:
    """`batch` in shared memory, where a loading process hands it on from.

    Here rather than on its way: an error in the thread that sends it would be lost, and the receiver wait for ever.
    """
    try:
        for tensor in batch:
            tensor.share_memory_()
    except RuntimeError as error:
        return DataError(f"{_SHARED}: a loading process cannot hand on its batch ({error}); {_ADVICE}")
    return batch


class _Process(multiprocessing.Process):
    """A loading process. It ignores the signals that ask to end, which a terminal or a batch system sends to it too:
    the main process saves, and then ends it. So one that is stuck has to be killed.
    """

    def terminate(self) -> None:
        """PyTorch's way to end a process that it has waited for in vain."""
        self.kill()

    def join(self, timeout: float | None = None) -> None:
        """Wait, at most as long as is worth it."""
        super().join(None if timeout is None else min(timeout, _PATIENCE))


def _kill_at_exit() -> None:
    """Python ends its processes by SIGTERM, which these ignore, and waits for them without end."""
    left = [process for process in multiprocessing.active_children() if isinstance(process, _Process)]
    if left and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler raises for one that was killed
    for process in left:
        process.kill()


atexit.register(_kill_at_exit)  # multiprocessing's own, registered by its import, comes after


def _begin(_: int) -> None:
    """In a loading process: no signal ends it, and it is silent where the main process hangs up as it ends it."""
    ignore()
    sys.excepthook = _unless_hung_up  # what the thread that hands batches on calls


def _unless_hung_up(kind: type[BaseException], error: BaseException, at: TracebackType | None) -> None:
    if not issubclass(kind, ConnectionError):
        sys.__excepthook__(kind, error, at)


class SliceLoader:
    """The batches of one epoch, as an iterable with a length; trouble in a loading process is a `DataError`."""

    def __init__(self, batches: _Batches, workers: int) -> None:
        context = copy.copy(multiprocessing.get_context()) if workers else None
        if context is not None:
            context.Process = _Process  # type: ignore[misc]
        self._loader = DataLoader(
            batches,
            batch_size=None,
            num_workers=workers,
            prefetch_factor=_PREFETCH if workers else None,
            pin_memory=torch.cuda.is_available(),
            multiprocessing_context=context,
            worker_init_fn=_begin,
        )

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        try:
            with worker_errors(), postponed():  # until they ignore signals, processes inherit that none reaches them
                batches = iter(self._loader)  # now and not at the first batch: it may draw from the global generator
        except OSError as error:
            workers = self._loader.num_workers
            raise DataError(
                f"train.workers: got {workers}, which cannot be started ({error.strerror}); {_ADVICE}"
            ) from error
        return self._received(batches)

    @staticmethod
    def _received(batches: Iterator[Batch | DataError]) -> Iterator[Batch]:
        try:
            while True:
                with worker_errors():
                    batch = next(batches, None)
                if batch is None:
                    return
                if isinstance(batch, DataError):
                    raise batch
                yield batch
        finally:
            # Explicitly: a traceback would keep them, and `__del__` would print that one was killed meanwhile.
            with contextlib.suppress(DataError), worker_errors():
                if end := getattr(batches, "_shutdown_workers", None):
                    end()
            del batches


@contextlib.contextmanager
def worker_errors() -> Iterator[None]:
    """Turn the loss of a loading process into a `DataError` with its cause.

    PyTorch raises it in the main thread as it happens, wherever that thread is: put a whole training loop under this.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith(_LOST):
            raise
        raise DataError(
            f"train.workers: a loading process was lost ({error}); killed processes often ran out of memory or of "
            f"{_SHARED}, a bus error may also be a cache whose files were cut: {_ADVICE}"
        ) from error


def _check_shared_memory(cache: Cache, batch_size: int, batches: int, workers: int, local_ranks: int) -> None:
    """Raise `DataError` if the batches of all loading processes do not fit into what shared memory is free."""
    if not workers or sys.platform != "linux" or not _SHARED.is_dir():
        return
    side = cache.image_size
    batch_bytes = batch_size * side * side * (cache.channels * 4 + 8)  # float32 images, int64 labels
    # All that is made ahead, the batch at work and the one before it; a sixteenth more for what else lies there.
    need = local_ranks * min(batches, workers * _PREFETCH + 2) * batch_bytes * 17 // 16
    free = shutil.disk_usage(_SHARED).free
    if free < need:
        mib = 2**20
        processes = f"{workers} processes" if local_ranks == 1 else f"{local_ranks} x {workers} processes"
        raise DataError(
            f"{_SHARED}: got {free / mib:.1f} MiB free, expected {need / mib:.1f} MiB for {processes} that load "
            f"batches of {batch_size} slices ({batch_bytes / mib:.1f} MiB each): {_ADVICE}"
        )


def epoch_order(count: int, seed: int, epoch: int) -> Array:
    """The shuffled order of `count` samples in an epoch; depends on nothing else."""
    return np.random.default_rng((seed, epoch, _ORDER)).permutation(count)


def slice_loader(
    cache: Cache,
    split: str,
    batch_size: int,
    *,
    seed: int = 0,
    epoch: int = 0,
    start_batch: int = 0,
    augment: bool = True,
    workers: int = 0,
    shuffle: bool = True,
    drop_last: bool | None = None,
    rank: int = 0,
    ranks: int = 1,
) -> SliceLoader:
    """The batches of one epoch, from `start_batch` on.

    The order depends only on (seed, epoch), the augmentation of a sample only on (seed, epoch, sample): any position of
    any epoch comes again exactly, whatever the number of workers.

    Args:
        cache: the prepared data.
        split: "train", "validation" or "test".
        batch_size: slices in a batch of one process.
        seed: of order and augmentation, at least 0.
        epoch: 0-based.
        start_batch: batches already done.
        augment: turns, flips and rotations.
        workers: processes that load; 0 loads in this one.
        shuffle: draw an order; else the cache's own.
        drop_last: leave out a last batch that is not full; by default when shuffling, unless it is the only one.
        rank: this process, of `ranks`.
        ranks: processes that train together: each takes its own share of every batch of `batch_size * ranks` slices.

    Returns:
        an iterable with a length, of images float32 `[B, C, S1, S1]` in 0..1 and labels int64 `[B, S1, S1]`.

    Raises:
        DataError: an unknown or empty split, too few slices for all processes, or too little shared memory for
            `workers`. While iterating: a loading process that fails or is killed.
        ValueError: `batch_size`, `start_batch` or `rank` out of range.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: got {batch_size}, expected at least 1")
    if not 0 <= rank < ranks:
        raise ValueError(f"rank: got {rank}, expected 0 to {ranks - 1}")
    positions = cache.split_slices(split)
    if shuffle:
        positions = positions[epoch_order(len(positions), seed, epoch)]
    whole = batch_size * ranks
    if len(positions) < whole and ranks > 1:
        raise DataError(f"{cache.folder}: got {len(positions)} slices in {split!r}, expected at least {whole}")
    if drop_last is None:
        drop_last = ranks > 1 or (shuffle and len(positions) >= whole)
    stop = len(positions) - len(positions) % whole if drop_last else len(positions)
    batches = [positions[i + rank * batch_size :][:batch_size] for i in range(0, stop, whole)]
    if not 0 <= start_batch <= len(batches):
        raise ValueError(f"start_batch: got {start_batch}, expected 0 to {len(batches)}")
    batches = batches[start_batch:]
    # torchrun says how many of the processes share this machine.
    local_ranks = min(ranks, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    _check_shared_memory(cache, batch_size, len(batches), workers, local_ranks)
    return SliceLoader(_Batches(cache, batches, seed, epoch, augment), workers)
