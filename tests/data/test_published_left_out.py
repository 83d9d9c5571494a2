"""What a download holds besides its data is counted."""

from __future__ import annotations

from pathlib import Path

import pytest

from simmp_fast.data import open_source
from simmp_fast.data.segpc2021 import segpc2021

MANY = "files with a name of no known form, such as"
ONE = MANY.replace("files", "file", 1)
ISIC, TRUTH = "ISIC2018_Task1-2_Training_Input", "ISIC2018_Task1_Training_GroundTruth"


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


@pytest.mark.parametrize(
    ("name", "data", "others", "lines"),
    [
        ("synapse", ["a/case0005_slice000.npz", "b/case0001.npy.h5"], ["a/list.txt"], [f": 1 .txt {ONE} a/list.txt"]),
        ("synapse", ["img/img0001.nii.gz", "label/label0001.nii.gz"], ["img/a.csv"], [f": 1 .csv {ONE} img/a.csv"]),
        (
            "acdc",
            ["p/patient001_frame01.nii.gz", "p/patient001_frame01_gt.nii.gz"],
            ["p/Info.cfg", "p/patient001_4d.nii.gz", "q/Info.cfg", "q/.hidden"],
            [f": 2 .cfg {MANY} p/Info.cfg", f": 1 .gz {ONE} p/patient001_4d.nii.gz"],
        ),
        ("acdc", ["case_001_sliceED_0.npz", "case_001_sliceED_1.npz"], ["readme"], [f": 1 other {ONE} readme"]),
        (
            "isic2018",
            [f"{ISIC}/ISIC_0000001.jpg", f"{TRUTH}/ISIC_0000001_segmentation.png"],
            [f"{ISIC}/LICENSE.txt", f"{TRUTH}/LICENSE.txt", f"{ISIC}/a.jpg"],
            [f": 1 .jpg {ONE} {ISIC}/a.jpg", f": 2 .txt {MANY} {ISIC}/LICENSE.txt"],
        ),
        (
            "segpc2021",
            [f"{part}/{file}" for part in ("train", "validation") for file in ("x/1.bmp", "y/1_1.bmp")],
            ["train/x/1.png", "validation/y/1.bmp"],
            [f"/train: 1 .png {ONE} x/1.png", f"/validation: 1 .bmp {ONE} y/1.bmp"],
        ),
    ],
)
def test_other_files_are_counted(
    tmp_path: Path, name: str, data: list[str], others: list[str], lines: list[str]
) -> None:
    touch(tmp_path, *data)
    assert open_source(name, tmp_path).left_out == ()
    touch(tmp_path, *others)
    assert open_source(name, tmp_path).left_out == tuple(f"{tmp_path}{line}" for line in lines)


def test_names_of_masks_compare_composed(tmp_path: Path) -> None:
    touch(tmp_path, "validation/x/1.bmp", "validation/y/1_1.bmp")
    touch(tmp_path, "train/x/e\u0301.bmp", "train/y/\u00e9_1.bmp", "train/x/\u00e8.bmp", "train/y/e\u0300_1.bmp")
    assert [case.id for case in segpc2021(tmp_path).cases] == ["train_\u00e8", "train_\u00e9", "validation_1"]
