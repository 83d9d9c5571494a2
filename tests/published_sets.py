"""Writers of the published data sets in their own layouts: the real names and counts, with tiny made-up pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from simmp_fast.data import DataError, acdc, open_source, prepare, synapse

nibabel = pytest.importorskip("nibabel")
SIDE = 8
AFFINE = np.array([[0.8, 0, 0, -10], [0, 0.7, 0, 20], [0, 0, 3, 5], [0, 0, 0, 1]])
# The split fixes the depth of training volumes only.
TEST_DEPTH = 3


def write_arrays(path: Path, **arrays: np.ndarray) -> Path:
    """An npz or HDF5 file; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    else:
        with h5py.File(path, "w") as file:
            for name, array in arrays.items():
                file[name] = array
    return path


def write_nifti(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, affine), path)


def write_picture(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def stack(rng: np.random.Generator, depth: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """A float32 image in 0..1 and its uint8 labels, `[depth, SIDE, SIDE]`."""
    shape = (depth, SIDE, SIDE)
    return rng.random(shape, np.float32), rng.integers(0, classes, shape).astype(np.uint8)


def write_synapse_prepared(root: Path) -> None:
    """Slices of the training cases, a volume of each test case."""
    rng = np.random.default_rng(0)
    for case, depth in synapse.SPLIT["train_slices_per_case"].items():
        image, label = stack(rng, depth, 9)
        for i in range(depth):
            write_arrays(root / "train_npz" / f"{case}_slice{i:03d}.npz", image=image[i], label=label[i])
    for case in synapse.PARTS["test"]:
        image, label = stack(rng, TEST_DEPTH, 9)
        write_arrays(root / "test_vol_h5" / f"{case}.npy.h5", image=image, label=label)


def write_synapse_raw(root: Path) -> None:
    """One pair of NIfTI files a case, values -200 to 399, labels 0 to 13."""
    rng = np.random.default_rng(1)
    depths = synapse.SPLIT["train_slices_per_case"] | dict.fromkeys(synapse.PARTS["test"], TEST_DEPTH)
    for case, depth in depths.items():
        number = case.removeprefix("case")
        image = rng.integers(-200, 400, (SIDE, SIDE, depth)).astype(np.int16)
        label = rng.integers(0, 14, (SIDE, SIDE, depth)).astype(np.uint8)
        write_nifti(root / "img" / f"img{number}.nii.gz", image)
        write_nifti(root / "label" / f"label{number}.nii.gz", label)


def write_acdc_raw(root: Path) -> None:
    """Two frames of each patient, and the film they are from; the sform says 1 mm, as that of the real files does."""
    rng = np.random.default_rng(2)
    for patient in acdc.PATIENTS:
        folder = root / "training" / f"patient{patient:03d}"
        for frame in (1, 12):
            base = folder / f"patient{patient:03d}_frame{frame:02d}"
            for ending, high in ((".nii.gz", 1000), ("_gt.nii.gz", 4)):
                volume = nibabel.Nifti1Image(rng.integers(0, high, (SIDE, SIDE, 3)).astype(np.int16), None)
                volume.header.set_zooms((1.5, 1.25, 10.0))
                volume.header.set_qform(np.diag([-1.5, -1.25, 10, 1]), 1)
                volume.header.set_sform(np.diag([-1.0, -1.0, 1, 1]), 1)
                base.parent.mkdir(parents=True, exist_ok=True)
                nibabel.save(volume, f"{base}{ending}")
        (folder / f"patient{patient:03d}_4d.nii.gz").touch()
        (folder / "Info.cfg").touch()


def write_acdc_prepared(root: Path, split: str) -> None:
    """Files as each of the splits circulates: names, folders, keys and number of slices."""
    rng = np.random.default_rng(3)
    chosen = acdc.SPLITS[split]
    held_out = {part: chosen[f"{part}_patients"] for part in ("validation", "test")}
    train = [p for p in acdc.PATIENTS if p not in (*held_out["validation"], *held_out["test"])]
    writer = {"released": _released, "mt_unet": _mt_unet, "ssl4mis": _ssl4mis}[split]
    for part, patients in {"train": train, **held_out}.items():
        total = {"train": chosen["train_slices"], "validation": 182, "test": 3 * 40}[part]
        for (patient, phase), depth in zip(
            [(p, phase) for p in patients for phase in (0, 1)], _shares(total, 2 * len(patients)), strict=True
        ):
            writer(root, part, patient, phase, *stack(rng, depth, 4))


def _shares(total: int, parts: int) -> list[int]:
    """`total` in nearly equal parts; the first is two larger at the cost of the last."""
    if not parts:
        return []
    shares = [total // parts + (i < total % parts) for i in range(parts)]
    shares[0] += 2
    shares[-1] -= 2
    return shares


def _released(root: Path, part: str, patient: int, phase: int, image: np.ndarray, label: np.ndarray) -> None:
    frame = (1, 12)[phase]
    if part == "test":
        write_arrays(root / "test" / f"patient{patient:03d}{frame:02d}.npy.h5", image=image, label=label)
        return
    for i in range(len(image)):
        path = root / "train" / f"patient{patient:03d}_frame{frame:02d}{i}.npz"
        write_arrays(path, image=image[i], label=label[i])


def _mt_unet(root: Path, part: str, patient: int, phase: int, image: np.ndarray, label: np.ndarray) -> None:
    name = ("ED", "ES")[phase]
    if part == "test":
        write_arrays(root / "test" / f"case_{patient:03d}_volume_{name}.npz", img=image, label=label)
        return
    folder = root / {"train": "train", "validation": "valid"}[part]
    for i in range(len(image)):
        write_arrays(folder / f"case_{patient:03d}_slice{name}_{i}.npz", img=image[i], label=label[i])


def _ssl4mis(root: Path, part: str, patient: int, phase: int, image: np.ndarray, label: np.ndarray) -> None:
    base = f"patient{patient:03d}_frame{phase + 1:02d}"
    write_arrays(root / "data" / f"{base}.h5", image=image, label=label)
    for i in range(len(image) if part == "train" else 0):
        write_arrays(root / "data" / "slices" / f"{base}_slice_{i + 1}.h5", image=image[i], label=label[i])


def write_isic2018(root: Path, count: int = 2594) -> None:
    """Pictures with masks of 0 and 255, and the papers that lie beside them."""
    rng = np.random.default_rng(4)
    for i in range(count):
        name = f"ISIC_{i:07d}"
        picture = rng.integers(0, 256, (SIDE, SIDE + 2, 3)).astype(np.uint8)
        mask = (rng.random((SIDE, SIDE + 2)) < 0.4).astype(np.uint8) * 255
        write_picture(root / "ISIC2018_Task1-2_Training_Input" / f"{name}.jpg", picture)
        write_picture(root / "ISIC2018_Task1_Training_GroundTruth" / f"{name}_segmentation.png", mask)
    (root / "ISIC2018_Task1-2_Training_Input" / "LICENSE.txt").touch()


def write_segpc2021(root: Path, counts: Sequence[int] = (298, 200)) -> None:
    """Pictures with a mask for each of two cells, whose squares overlap."""
    rng = np.random.default_rng(5)
    for part, count in zip(("train", "validation"), counts, strict=True):
        for i in range(count):
            picture = rng.integers(0, 256, (SIDE, SIDE + 2, 3)).astype(np.uint8)
            write_picture(root / part / "x" / f"{i + 100}.bmp", picture)
            for cell in (1, 2):
                write_picture(root / part / "y" / f"{i + 100}_{cell}.bmp", segpc_mask(cell))


def segpc_mask(cell: int) -> np.ndarray:
    """Cytoplasm 20 around a nucleus 40; cell 2 lies across the nucleus of cell 1."""
    mask = np.zeros((SIDE, SIDE + 2), np.uint8)
    mask[cell : cell + 4, cell : cell + 4] = 20
    mask[cell + 1 : cell + 3, cell + 1 : cell + 3] = 40
    return mask


def refusal(name: str, root: Path, split: str | None = None) -> list[str]:
    """The lines of the error with which a download is refused, heading aside, paths below `root`."""
    with pytest.raises(DataError) as caught:
        prepare(open_source(name, root, split), root.parent / "out", SIDE)
    assert not (root.parent / "out").exists()
    heading, *lines = str(caught.value).splitlines()
    assert heading.startswith(f"data set {name!r} cannot be prepared: {len(lines)} problem")
    return [line.strip().replace(f"{root}/", "") for line in lines]


def assert_named_once(lines: Sequence[str], expected: Sequence[str], *, first: bool = False) -> None:
    """Fail unless each expected text is in one line (`first`: begins one), and there is no other line."""
    assert len(lines) == len(expected), lines
    for text in expected:
        assert sum(line.startswith(text) if first else text in line for line in lines) == 1, (text, lines)
