"""New files through a trained model: label maps with the geometry of their images, probabilities, overlays."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm

from simmp_fast.console import Console
from simmp_fast.data.errors import DataError, disk_errors, reading, refuse_impossible
from simmp_fast.data.formats import NIFTI, PICTURES, Volume, extension, read_image, stem
from simmp_fast.data.names import report
from simmp_fast.data.preprocess import Geometry, Recipe, from_slices, network_input, resize_label, to_slices
from simmp_fast.evaluation.inference import (
    NotFiniteError,
    check_network,
    segment,
    segment_probabilities,
)
from simmp_fast.evaluation.label_files import write_label_map, write_probabilities
from simmp_fast.evaluation.report import check_folder
from simmp_fast.files import check_length, remove_leftovers
from simmp_fast.messages import memory_shortage
from simmp_fast.pictures import Sample, save_overlays

OVERLAY_SLICES = 4

T = TypeVar("T")


@dataclass(frozen=True)
class _Job:
    """One image and the files it becomes; None for those not asked for."""

    source: Path
    labels: Path
    probabilities: Path | None
    overlay: Path | None

    @property
    def outputs(self) -> list[Path]:
        return [path for path in (self.labels, self.probabilities, self.overlay) if path is not None]


def predict(
    model: nn.Module,
    description: Recipe,
    input_path: str | Path,
    output_path: str | Path,
    *,
    mirror: bool = False,
    probabilities: bool = False,
    overlays: bool = False,
    overwrite: bool = False,
    batch_size: int = 8,
    device: str | torch.device | None = None,
    precision: str = "float32",
    progress: bool = False,
) -> list[Path]:
    """Segment a NIfTI volume, a picture, or every one of them in a folder.

    A NIfTI volume becomes a uint8 label map in the file's own axis order with the same affine, qform, sform and voxel
    size, whatever the orientation; a PNG, JPEG, TIFF or BMP becomes a PNG of class indices. Every file appears complete
    or not at all.

    Args:
        model: returns a list of heads `[B, classes, S1, S1]`; moved to `device` if one is named.
        description: classes, channels, intensity rule, slice axis and S1 of the data the model was trained on.
        input_path: a file, or a folder whose NIfTI files and pictures are all taken. What else is there, subfolders
            too, is left out, and named on standard error; hidden files are left out without a word.
        output_path: for a file, the label map (`.nii`, `.nii.gz`; `.png` for a picture) or a folder to put it in; for a
            folder, the folder of the label maps, `<name>.nii.gz` and `<name>.png`.
        mirror: average over mirror images.
        probabilities: also write `<name>_probabilities.nii.gz`, float32, classes on the fourth axis (`.npy`, classes
            last, for a picture); their argmax is the label map.
        overlays: also write `<name>_overlay.png`, up to four slices with the label map drawn on them.
        overwrite: replace files that are already there.
        batch_size: slices per forward pass.
        device: None is where the model is.
        precision: "float32" or "bfloat16" (autocast).
        progress: show a bar on a terminal.

    Returns:
        the files written, image by image.

    Raises:
        DataError: nothing to read, an output in the way, a bad file, a network whose weights, or output for a file, are
            not finite, or one of another number of classes or channels or another image size than `description`. In a
            folder the good files are done all the same, and the error at the end names the bad ones, and those for
            which memory was short.
        MemoryError: memory was short for a single file; names it.
    """
    source, target = Path(input_path), Path(output_path)
    check_network(
        model,
        description.name,
        classes=len(description.classes),
        in_channels=description.channels,
        image_size=description.image_size,
    )
    refuse_impossible(target)
    with reading(source):
        folder = source.is_dir()
    jobs = _folder_jobs(source, target) if folder else [_file_job(source, target)]
    jobs = [_with_extras(job, probabilities, overlays) for job in jobs]
    if clashes := list(_clashes(jobs)):
        raise DataError.listing(f"{source}: images whose outputs would have one name", clashes)
    check_folder(jobs[0].labels.parent)
    remove_leftovers(jobs[0].labels.parent)
    options = {"batch_size": batch_size, "device": device, "precision": precision, "mirror": mirror}
    written: list[Path] = []
    problems: list[str] = []
    for job in _bar(jobs, "file", progress and folder):
        try:
            _refuse_existing(job, overwrite)
            _run(model, description, job, options, progress and not folder)
        except NotFiniteError as error:
            message = f"{job.source}: slice {error.index}: the network's output is not finite, expected numbers"
            if not folder:
                raise DataError(message) from error
            problems.append(message)
        except DataError as error:
            if not folder:
                raise
            problems.append(str(error))
        except (MemoryError, RuntimeError) as error:
            shortage = memory_shortage(error)
            if shortage is None:
                raise
            if not folder:
                raise MemoryError(f"{job.source}: {shortage}") from error
            problems.append(f"{job.source}: {shortage}")
        else:
            written += job.outputs
    if problems:
        done = len(jobs) - len(problems)
        raise DataError.listing(f"{source}: {done} of {len(jobs)} files done, the others could not be", problems)
    return written


def _bar(items: Sequence[T], unit: str, show: bool) -> Iterable[T]:
    """`items` behind a progress bar; `disable=None` keeps it quiet where the output is no terminal."""
    return tqdm(items, desc="predict", unit=unit, disable=None if show else True, file=Console(sys.stderr), leave=False)


def _run(model: nn.Module, recipe: Recipe, job: _Job, options: dict[str, Any], progress: bool) -> None:
    """Read, segment and write one image."""
    # Where affine and header state two voxel sizes either will do: the label map keeps the file's own header.
    volume = read_image(job.source, header_spacing=True)
    images, placed = network_input(volume, recipe)
    count, shape = len(recipe.classes), placed.slice_shape
    labels = np.empty(shape, np.uint8)
    slices = _bar(list(images), "slice", progress)
    if job.probabilities is None:
        with closing(segment(model, slices, count, **options)) as small_labels:
            for index, small in enumerate(small_labels):
                labels[index] = resize_label(small, shape[1:])
    else:
        likely = np.empty((*shape, count), np.float32)
        with closing(segment_probabilities(model, slices, count, **options)) as small_maps:
            for index, maps in enumerate(small_maps):
                likely[index] = np.moveaxis(resize_label(maps, shape[1:]), 0, -1)
                labels[index] = likely[index].argmax(-1)
        write_probabilities(job.probabilities, from_slices(likely, placed), job.source)
    if job.overlay is not None:
        _draw(job.overlay, volume, placed, labels, recipe)
    # Last, so that a label map that is there says that all is there.
    write_label_map(job.labels, from_slices(labels, placed), job.source)


def _draw(path: Path, volume: Volume, placed: Geometry, labels: NDArray[np.uint8], recipe: Recipe) -> None:
    """An overlay of slices spread evenly over those with foreground (over all where there is none)."""
    planes = to_slices(recipe.intensity.apply(volume), placed)
    found = np.flatnonzero(labels.any(axis=(1, 2)))
    among = found if len(found) else np.arange(len(labels))
    parts = min(OVERLAY_SLICES, len(among))
    chosen = among[((np.arange(parts) + 0.5) * len(among) / parts).astype(int)]
    aspect = placed.spacing[1] / placed.spacing[2]
    samples = []
    for index in chosen:
        plane = planes[index]
        image = plane if plane.ndim == 2 else np.moveaxis(plane, -1, 0)
        title = f"slice {index}" if len(labels) > 1 else ""
        samples.append(Sample(image, None, labels[index], title, aspect))
    save_overlays(path, samples, recipe.classes, stem(volume.path))


def _default_name(source: Path) -> str:
    return stem(source) + (".nii.gz" if extension(source) in NIFTI else ".png")


def _file_job(source: Path, target: Path) -> _Job:
    """The job of one file; `target` is the label map or a folder."""
    with reading(source):
        missing = not source.exists()
    if missing:
        raise DataError(f"{source}: no such file or folder")
    kind = extension(source)
    if kind not in NIFTI + PICTURES:
        raise DataError(f"{source}: unknown kind of file, expected one of {', '.join(NIFTI + PICTURES)}")
    with disk_errors(target):
        inside = target.is_dir() or not target.suffix
    if inside:
        target = target / _default_name(source)
    allowed = NIFTI if kind in NIFTI else (".png",)
    if not target.name.endswith(allowed):
        raise DataError(f"{target}: got an output of kind {target.suffix!r}, expected {' or '.join(allowed)}")
    return _Job(source, target, None, None)


def _folder_jobs(source: Path, target: Path) -> list[_Job]:
    """One job for each image in a folder; `target` is the folder of the label maps."""
    if os.path.realpath(target) == os.path.realpath(source):
        raise DataError(f"{target}: is the folder of the images, expected another one for the label maps")
    with disk_errors(target):
        in_the_way = target.exists() and not target.is_dir()
    if in_the_way:
        raise DataError(f"{target}: is a file, expected a folder as {source} is one")
    with reading(source):
        visible = [path for path in sorted(source.iterdir()) if not path.name.startswith(".")]
        files = [path for path in visible if path.is_file() and extension(path) in NIFTI + PICTURES]
    jobs = [_Job(path, target / _default_name(path), None, None) for path in files]
    if not jobs:
        raise DataError(f"{source}: no image in this folder, expected files of kind {', '.join(NIFTI + PICTURES)}")
    output = os.path.realpath(target)
    _say_left_out(source, [path for path in visible if path not in files and os.path.realpath(path) != output])
    return jobs


def _say_left_out(source: Path, paths: list[Path]) -> None:
    if paths:
        names = [f"{path.name}: a folder" if path.is_dir() else path.name for path in paths]
        heading = f"{source}, left out: {len(paths)}, expected files of kind {', '.join(NIFTI + PICTURES)}"
        print(report(heading, names), file=sys.stderr)


def _clashes(jobs: list[_Job]) -> Iterator[str]:
    first: dict[Path, Path] = {}
    for job in jobs:
        for output in job.outputs:
            other = first.setdefault(output, job.source)
            if other != job.source:
                yield f"{other.name} and {job.source.name}: both would become {output.name}"


def _with_extras(job: _Job, probabilities: bool, overlays: bool) -> _Job:
    base = job.labels.with_name(stem(job.labels))
    ending = ".npy" if job.labels.suffix == ".png" else ".nii.gz"
    return _Job(
        job.source,
        job.labels,
        base.with_name(f"{base.name}_probabilities{ending}") if probabilities else None,
        base.with_name(f"{base.name}_overlay.png") if overlays else None,
    )


def _refuse_existing(job: _Job, overwrite: bool) -> None:
    if os.path.realpath(job.source) in map(os.path.realpath, job.outputs):
        raise DataError(f"{job.source}: is also the output, expected another file for the label map")
    there = []
    for path in job.outputs:
        with disk_errors(path):
            check_length(path)
            there += [str(path)] if os.path.lexists(path) else []
    if there and not overwrite:
        raise DataError(f"{', '.join(there)}: already there; overwrite replaces it")
