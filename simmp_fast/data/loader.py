"""Batches of slices from a cache: shuffled and augmented the same way whenever, and with however many processes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from simmp_fast.data.augment import augment as augment_sample
from simmp_fast.data.cache import Cache
from simmp_fast.data.errors import DataError
from simmp_fast.data.formats import Array

Batch = tuple[Tensor, Tensor]

# Tags that keep the two kinds of draws apart.
_ORDER, _SAMPLE = 1, 2


class _Batches(Dataset[Batch]):
    """Item `i` is batch `i` of an epoch."""

    def __init__(self, cache: Cache, batches: list[Array], seed: int, epoch: int, augment: bool) -> None:
        self._cache, self._batches = cache, batches
        self._seed, self._epoch, self._augment = seed, epoch, augment

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> Batch:
        cache, positions = self._cache, self._batches[index]
        side = cache.image_size
        images = np.empty((len(positions), cache.channels, side, side), np.float32)
        labels = np.empty((len(positions), side, side), np.int64)
        for place, position in enumerate(positions):
            image, label = cache.images[position], cache.labels[position]
            if self._augment:
                rng = np.random.default_rng((self._seed, self._epoch, _SAMPLE, int(position)))
                image, label = augment_sample(image, label, rng)
            images[place], labels[place] = image, label
        images *= np.float32(cache.image_scale)
        return torch.from_numpy(images), torch.from_numpy(labels)


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
) -> DataLoader[Batch]:
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
        DataError: an unknown or empty split, or too few slices for all processes.
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
    return DataLoader(
        _Batches(cache, batches[start_batch:], seed, epoch, augment),
        batch_size=None,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
    )
