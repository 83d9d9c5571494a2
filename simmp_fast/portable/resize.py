"""Heads at their own resolution, read and written by bands of rows of the label they are resized to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def resize_matrix(source: int, target: int, like: Tensor) -> Tensor:
    """``[target, source]``: the weights of a bilinear resize (``align_corners=False``) along one axis.

    In the dtype and on the device of `like`. A row holds two neighbours at most and sums to 1.
    """
    centre = (torch.arange(target, device=like.device, dtype=like.dtype) + 0.5) * (source / target) - 0.5
    centre = centre.clamp(0, source - 1).unsqueeze(1)
    return (1 - (centre - torch.arange(source, device=like.device, dtype=like.dtype)).abs()).clamp_min_(0)


class Band(NamedTuple):
    """Some rows of one image of the batch."""

    image: int
    rows: slice


class _Head:
    """One head ``[B, classes, h, w]`` as ``[B, h, classes, width]``: wide already, its rows still to be resized.

    A bilinear resize is one small matrix for each axis; gradients go back through the transposed matrices. The short
    axis is done once, the long one band by band, from the few source rows that a band reads.
    """

    def __init__(self, head: Tensor, size: tuple[int, int], dtype: torch.dtype) -> None:
        height, width = size
        rows = head.to(dtype).permute(0, 2, 1, 3)
        self.scale = head.shape[2] / height
        self.down = None if head.shape[2] == height else resize_matrix(head.shape[2], height, rows)
        self.across = None if head.shape[3] == width else resize_matrix(head.shape[3], width, rows)
        self.rows = rows.contiguous() if self.across is None else rows @ self.across.t()

    def source_rows(self, band: Band) -> slice:
        """The rows of the head that a band reads, with one to spare on either side."""
        first = int((band.rows.start + 0.5) * self.scale - 0.5) - 1
        last = int((band.rows.stop - 0.5) * self.scale - 0.5) + 2
        return slice(max(first, 0), min(last + 1, self.rows.shape[1]))

    def read(self, band: Band) -> Tensor:
        """``[rows, classes, width]``."""
        if self.down is None:
            return self.rows[band.image, band.rows]
        source = self.source_rows(band)
        part = self.rows[band.image, source]
        return (self.down[band.rows, source] @ part.flatten(1)).unflatten(1, part.shape[1:])

    def add_gradient(self, band: Band, gradient: Tensor, into: Tensor) -> None:
        """Add ``[rows, classes, width]`` to `into`, of the shape of ``self.rows``."""
        if self.down is None:
            into[band.image, band.rows] += gradient
        else:
            source = self.source_rows(band)
            into[band.image, source].flatten(1).addmm_(self.down[band.rows, source].t(), gradient.flatten(1))

    def finish(self, gradient: Tensor) -> Tensor:
        """The gradient of the head from that of ``self.rows``."""
        gradient = gradient if self.across is None else gradient @ self.across
        return gradient.permute(0, 2, 1, 3)


class ResizedHeads:
    """Heads ``[B, classes, h_i, w_i]`` read at the size ``(h, w)`` of the label, a band at a time, and their gradients.

    Products and results are in `dtype`, float32 or better.
    """

    def __init__(self, heads: Sequence[Tensor], size: tuple[int, int]) -> None:
        self.size, self.count = size, len(heads)
        self.batch, self.classes = heads[0].shape[:2]
        self.dtype = torch.promote_types(heads[0].dtype, torch.float32)
        self._heads = [_Head(head, size, self.dtype) for head in heads]

    def bands(self, pixels: int) -> Iterator[Band]:
        """Bands of at most `pixels` pixels, at least one row, that cover the batch in order."""
        height, width = self.size
        step = max(1, pixels // width)
        for image in range(self.batch):
            for start in range(0, height, step):
                yield Band(image, slice(start, min(start + step, height)))

    def read(self, i: int, band: Band, out: Tensor) -> None:
        """Write head `i` in a band to `out`, ``[classes, pixels]``."""
        part = self._heads[i].read(band).transpose(0, 1)
        out.view(part.shape).copy_(part)

    def new_gradients(self) -> list[Tensor]:
        """Zeros for `add_gradient` to add to."""
        return [torch.zeros_like(head.rows) for head in self._heads]

    def add_gradient(self, i: int, band: Band, gradient: Tensor, into: list[Tensor]) -> None:
        """Add the gradient ``[classes, pixels]`` of head `i` in a band."""
        self._heads[i].add_gradient(band, gradient.unflatten(1, (-1, self.size[1])).transpose(0, 1), into[i])

    def finish(self, gradients: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """The sums of `add_gradient` as contiguous ``[B, classes, h_i, w_i]`` in `dtype`."""
        parts = [head.finish(gradient) for head, gradient in zip(self._heads, gradients, strict=True)]
        return [part.to(dtype).contiguous() for part in parts]
