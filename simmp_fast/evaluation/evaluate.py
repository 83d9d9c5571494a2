"""A split of a prepared cache through a model: metrics at native size, and the cheap Dice used while training."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm

from simmp_fast.console import Console
from simmp_fast.data.errors import DataError
from simmp_fast.data.names import nfc
from simmp_fast.data.preprocess import Intensity, resize_label
from simmp_fast.evaluation.inference import NotFiniteError, Slice, check_network, segment
from simmp_fast.evaluation.protocols import Protocol, get_protocol
from simmp_fast.evaluation.report import Evaluation, Row

if TYPE_CHECKING:
    from simmp_fast.data.cache import Cache, Case
    from simmp_fast.data.preprocess import Recipe


def evaluate(
    model: nn.Module,
    cache: Cache,
    split: str,
    *,
    protocol: str = "published",
    batch_size: int = 8,
    device: str | torch.device | None = None,
    precision: str = "float32",
    mirror: bool = False,
    progress: bool = False,
) -> Evaluation:
    """Segment every case of a split and score it at its own size.

    Label maps at S1 are brought to the native slice size by the nearest pixel and scored as a volume; a case of one
    slice is scored as a picture, in two dimensions. The model's weights, state and training flags do not change.

    Args:
        model: returns a list of heads `[B, classes, S1, S1]`; moved to `device` if one is named.
        cache: prepared cache.
        split: one of the cache's splits.
        protocol: "published" or "strict"; "strict" measures in voxels, and says so, where no case states its spacing.
        batch_size: slices per forward pass; slices of several cases share a batch.
        device: None is where the model is.
        precision: "float32" or "bfloat16" (autocast).
        mirror: average over mirror images.
        progress: show a bar on a terminal.

    Raises:
        DataError: an unknown or empty split, a model of another number of classes or channels or another image size,
            cases with and without spacing under a protocol in millimetres, weights or outputs of the network that are
            not finite, or values of the cache that are not finite or no class.
        ValueError: an unknown protocol or precision.
    """
    rule = get_protocol(protocol)
    _check_fits(model, cache)
    cases = _cases(cache, split)
    rule = _measurable(rule, cases)
    slices = _progress(_slices(cases), sum(case.slices for case in cases), f"evaluate {split}", progress)
    count = len(cache.classes)
    rows: list[Row] = []
    options: dict[str, Any] = {"batch_size": batch_size, "device": device, "precision": precision, "mirror": mirror}
    with _named(cases), closing(segment(model, slices, count, **options)) as maps:
        for case, predicted in _by_case(cases, maps):
            rows += _score(case, predicted, cache.classes, rule)
    return Evaluation(cache.name, split, rule, tuple(cache.classes), tuple(rows), cache.checksum)


def case_dice(
    model: nn.Module,
    cache: Cache,
    split: str,
    *,
    batch_size: int = 8,
    device: str | torch.device | None = None,
    precision: str = "float32",
    progress: bool = False,
    rank: int = 0,
    ranks: int = 1,
) -> list[float]:
    """Foreground Dice of each case of a split at network resolution: the validation metric of training.

    For each case and class, `2 |P and T| / (|P| + |T|)` from pixel counts over all slices of the case at S1; a class
    absent from prediction and truth is left out; mean over the classes of a case. A case without any is left out.
    No surface distances and no resizing, so it costs little more than the forward passes.

    Args:
        model, cache, split, batch_size, device, precision, progress: as in `evaluate`.
        rank: this process, of `ranks`.
        ranks: processes that share the cases: each takes every `ranks`-th.

    Returns:
        numbers in 0..1.

    Raises:
        DataError: as in `evaluate`.
    """
    _check_fits(model, cache)
    cases = _cases(cache, split)[rank::ranks]
    slices = _progress(_slices(cases), sum(case.slices for case in cases), f"validate {split}", progress)
    count = len(cache.classes)
    means = []
    options: dict[str, Any] = {"batch_size": batch_size, "device": device, "precision": precision}
    with _named(cases), closing(segment(model, slices, count, **options)) as maps:
        for case, predicted in _by_case(cases, maps):
            confusion = _confusion(predicted, case.checked_labels(), count)
            total = (confusion.sum(0) + confusion.sum(1))[1:]
            present = total > 0
            if present.any():
                means.append(float((2 * confusion.diagonal()[1:][present] / total[present]).mean()))
    return means


def check_prepared_alike(trained: Recipe, cache: Cache, source: str | Path) -> None:
    """Refuse a cache that was prepared in another way than the data a network was trained on.

    The name of the data set may differ. Class names are compared in Unicode's NFC.

    Args:
        trained: what the network's training data were made with.
        cache: what it is to be measured on.
        source: the file that `trained` comes from, for the message.

    Raises:
        DataError: lists all that differs.
    """
    differences = []
    for key in ("classes", "channels", "image_size", "intensity", "slice_axis"):
        got, need = _described(getattr(cache.recipe, key)), _described(getattr(trained, key))
        if got != need:
            differences.append(f"{key}: got {got}, expected {need}")
    if differences:
        raise DataError.listing(f"{cache.folder}: differs from what the network was trained on ({source})", differences)


def check_class_names(trained: Sequence[str], cache: Cache, source: str | Path) -> None:
    """As `check_prepared_alike`, where only the class names are known."""
    got, need = _described(cache.classes), _described(trained)
    if got != need:
        raise DataError(
            f"{cache.folder}: differs from what the network was trained on ({source}): classes: got {got}, "
            f"expected {need}"
        )


def _described(value: Any) -> str:
    """A setting of a recipe as text that is equal exactly for equal settings."""
    if isinstance(value, Intensity):
        return f"{value.rule} {float(value.low)} to {float(value.high)}"
    if isinstance(value, (list, tuple)):
        return repr([nfc(name) for name in value])
    return repr(value)


def _check_fits(model: nn.Module, cache: Cache) -> None:
    check_network(
        model, cache.name, classes=len(cache.classes), in_channels=cache.channels, image_size=cache.image_size
    )


def _measurable(protocol: Protocol, cases: Sequence[Case]) -> Protocol:
    """The protocol in the unit that the cases allow."""
    unknown = [case.id for case in cases if not case.geometry.has_spacing]
    if protocol.unit == "voxel" or not unknown:
        return protocol
    if len(unknown) == len(cases):
        return protocol.in_voxels()
    raise DataError(
        f"protocol {protocol.name!r}: the files of {', '.join(unknown)} state no spacing and the others do, expected "
        "one or the other: distances in voxels and in mm have no mean"
    )


def _score(case: Case, predicted: NDArray[np.uint8], classes: Sequence[str], protocol: Protocol) -> list[Row]:
    """The rows of one case from its label maps `[slices, S1, S1]`."""
    truth = case.native_labels()
    prediction = resize_label(predicted, truth.shape[1:])
    spacing: Sequence[float] = case.spacing
    if case.slices == 1:  # in three dimensions every pixel of a lone slice would lie on the surface
        prediction, truth, spacing = prediction[0], truth[0], spacing[1:]
    scores = protocol.score(prediction, truth, len(classes), spacing)
    return [Row(case.id, label, classes[label], score) for label, score in enumerate(scores, start=1)]


def _confusion(predicted: NDArray[np.uint8], truth: NDArray[np.uint8], count: int) -> NDArray[np.int64]:
    """Pixels of each pair of true class (row) and predicted class (column), int64 `[count, count]`."""
    confusion = np.zeros(count * count, np.int64)
    for predicted_slice, true_slice in zip(predicted, truth, strict=True):
        pairs = true_slice.astype(np.intp) * count + predicted_slice
        confusion += np.bincount(pairs.ravel(), minlength=count * count)
    return confusion.reshape(count, count)


def _cases(cache: Cache, split: str) -> list[Case]:
    if not cache.splits.get(split):
        filled = ", ".join(name for name, ids in cache.splits.items() if ids)
        raise DataError(f"split: got {split!r}, expected one of {cache.name!r} that holds cases: {filled}")
    return [cache.case(name) for name in cache.splits[split]]


def _slices(cases: Iterable[Case]) -> Iterator[Slice]:
    for case in cases:
        for index in range(case.slices):
            yield case.image(index)


@contextmanager
def _named(cases: Sequence[Case]) -> Iterator[None]:
    """Say of which case and slice a network's output is not finite."""
    try:
        yield
    except NotFiniteError as error:
        places = [(case, index) for case in cases for index in range(case.slices)]
        case, index = places[error.index]
        message = f"case {case.id}, slice {index} ({case.source}): the network's output is not finite"
        raise DataError(f"{message}, expected numbers") from error


def _by_case(cases: Iterable[Case], maps: Iterator[NDArray[np.uint8]]) -> Iterator[tuple[Case, NDArray[np.uint8]]]:
    """Each case with its label maps `[slices, S1, S1]`, cut from the stream."""
    for case in cases:
        yield case, np.stack(list(itertools.islice(maps, case.slices)))


def _progress(slices: Iterator[Slice], total: int, what: str, show: bool) -> Iterator[Slice]:
    """The stream behind a progress bar; `disable=None` keeps tqdm quiet where the output is no terminal."""
    bar = tqdm(slices, what, total, unit="slice", disable=None if show else True, file=Console(sys.stderr), leave=False)
    return iter(bar)
