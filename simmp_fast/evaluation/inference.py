"""Slices in, label maps out: batches through a model in evaluation mode, without gradients (model, section 1).

Slices form one stream, packed into batches whatever case they come from, so data sets of single pictures run as fast as
volumes. The model's training flags come back as they were; nothing else of it changes.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing, contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from simmp_fast.config import PRECISIONS
from simmp_fast.data.errors import DataError
from simmp_fast.validation import check_choice, check_positive

# Axes of [B, C, H, W] that each of the four views mirrors.
MIRRORS: tuple[tuple[int, ...], ...] = ((), (2,), (3,), (2, 3))

Slice = NDArray[np.floating]


class NotFiniteError(DataError):
    """The network's output for a slice holds NaN or infinities.

    Attributes:
        index: the slice's place in the stream.
    """

    def __init__(self, index: int) -> None:
        super().__init__(f"model: its output for slice {index} is not finite, expected numbers")
        self.index = index


def check_network(model: nn.Module, name: str, *, classes: int, in_channels: int, image_size: int) -> None:
    """Raise `DataError` unless a network has finite weights, and was made for data of these sizes if it states its own.

    Args:
        model: the network; one without `config` is taken as it is.
        name: of the data set, for the message.
        classes, in_channels, image_size: as the data have them.
    """
    if (damaged := _not_finite(model)) is not None:
        raise DataError(f"model: {damaged} is not finite, expected weights that are numbers")
    config = getattr(model, "config", None)
    needs = {"classes": classes, "in_channels": in_channels, "image_size": image_size}
    wrong = {key: getattr(config, key, need) for key, need in needs.items() if getattr(config, key, need) != need}
    if wrong:
        got = ", ".join(f"{key} {value}" for key, value in wrong.items())
        need = ", ".join(f"{key} {needs[key]}" for key in wrong)
        raise DataError(f"model: got {got}, expected {need} as the data set {name!r} has")


@torch.no_grad()
def _not_finite(model: nn.Module) -> str | None:
    """The name of the first parameter or buffer with NaN or infinities; the device is asked once."""
    named = itertools.chain(model.named_parameters(), model.named_buffers())
    tensors = {name: tensor for name, tensor in named if tensor.is_floating_point()}
    if not tensors:
        return None
    place = model_device(model)
    finite = torch.stack([tensor.isfinite().all().to(place) for tensor in tensors.values()]).cpu()
    return None if finite.all() else list(tensors)[int(finite.int().argmin())]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; afterwards every submodule has the training flag it had."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


def model_device(model: nn.Module) -> torch.device:
    """The device of the model's first parameter or buffer; the CPU for a model without any."""
    first = next(itertools.chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if first is None else first.device


def class_probabilities(
    model: nn.Module, images: Tensor, *, mirror: bool = False, precision: str = "float32"
) -> Tensor:
    """Softmax of the sum of the model's heads.

    Args:
        model: returns a list of heads `[B, classes, S1, S1]`; run in the mode it is in (see `evaluating`).
        images: `[B, C, S1, S1]`, float32, on the model's device.
        mirror: average the probabilities over the image and its mirror images (up-down, left-right, both).
        precision: "float32", or "bfloat16" for autocast; the sum and the softmax are float32 either way.

    Returns:
        float32 `[B, classes, S1, S1]`.

    Raises:
        NotFiniteError: an output of NaN or infinities.
        ValueError: an unknown precision.
    """
    return _finite_probabilities(model, images, mirror, precision, first=0)


@torch.inference_mode()
def _finite_probabilities(model: nn.Module, images: Tensor, mirror: bool, precision: str, first: int) -> Tensor:
    """As `class_probabilities`; the images are the stream's slices from number `first` on."""
    check_choice("precision", precision, PRECISIONS)
    views = MIRRORS if mirror else MIRRORS[:1]
    total: Tensor | None = None
    finite = torch.ones(len(images), dtype=torch.bool, device=images.device)
    for axes in views:
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16"):
            heads = model(torch.flip(images, axes) if axes else images)
        logits = torch.stack([head.float() for head in heads]).sum(0)
        finite &= logits.isfinite().flatten(1).all(1)
        probabilities = torch.flip(torch.softmax(logits, dim=1), axes) if axes else torch.softmax(logits, dim=1)
        total = probabilities if total is None else total + probabilities
    assert total is not None
    if not finite.all():
        raise NotFiniteError(first + int(finite.int().argmin()))
    return total / len(views)


def segment(
    model: nn.Module,
    slices: Iterable[Slice],
    classes: int,
    *,
    batch_size: int = 8,
    device: str | torch.device | None = None,
    precision: str = "float32",
    mirror: bool = False,
) -> Generator[NDArray[np.uint8], None, None]:
    """The label map of each slice, in order.

    Args:
        model: as in `class_probabilities`; moved to `device` if one is named. Its training flags are back when the
            generator has come to its end or is closed (`contextlib.closing`).
        slices: `[C, S1, S1]` each, 0..1.
        classes: number of classes the model must return, background included.
        batch_size: slices per forward pass; the result does not depend on it.
        device: None is where the model is.
        precision: "float32" or "bfloat16".
        mirror: test-time mirroring.

    Yields:
        uint8 `[S1, S1]`.

    Raises:
        DataError: a model of another number of classes, or (`NotFiniteError`) an output of NaN or infinities.
        ValueError: an option that does not fit.
    """
    with closing(_batches(model, slices, classes, batch_size, device, precision, mirror)) as batches:
        for batch in batches:
            yield from batch.argmax(1).to(torch.uint8).cpu().numpy()


def segment_probabilities(
    model: nn.Module,
    slices: Iterable[Slice],
    classes: int,
    *,
    batch_size: int = 8,
    device: str | torch.device | None = None,
    precision: str = "float32",
    mirror: bool = False,
) -> Generator[NDArray[np.float32], None, None]:
    """As `segment`, but yields class probabilities, float32 `[classes, S1, S1]`, whose argmax is the label map."""
    with closing(_batches(model, slices, classes, batch_size, device, precision, mirror)) as batches:
        for batch in batches:
            yield from batch.cpu().numpy()


def _batches(
    model: nn.Module,
    slices: Iterable[Slice],
    classes: int,
    batch_size: int,
    device: str | torch.device | None,
    precision: str,
    mirror: bool,
) -> Generator[Tensor, None, None]:
    """Probabilities `[B, classes, S1, S1]` of consecutive slices, on the device."""
    check_positive("batch_size", batch_size)
    if device is not None:
        model.to(device)
    place = model_device(model) if device is None else torch.device(device)
    if getattr(getattr(model, "config", None), "variant", None) == "released":
        batch_size = 1  # this variant treats the first image of a batch apart: one slice at a time, as it was evaluated
    stream, done = iter(slices), 0
    with evaluating(model):
        while chunk := list(itertools.islice(stream, batch_size)):
            images = torch.from_numpy(np.stack(chunk).astype(np.float32, copy=False)).to(place)
            probabilities = _finite_probabilities(model, images, mirror, precision, first=done)
            done += len(chunk)
            if probabilities.shape[1] != classes:
                raise DataError(f"model: got {probabilities.shape[1]} classes, expected {classes} as the data has")
            yield probabilities
