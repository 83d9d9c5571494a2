"""``simmp-fast prepare`` with the YAML files that its help text and the README show."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import numpy as np
import pytest
import yaml
from small_sets import write_picture

from simmp_fast.cli import main
from simmp_fast.data import Cache

ROOT = Path(__file__).parents[2]


def help_text(capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit):
        main(["prepare", "--help"])
    return capsys.readouterr().out


@pytest.mark.parametrize(("where", "counts"), [("help", [6, 2, 2]), ("README", [7, 1, 2])])
def test_the_yaml_that_users_copy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], where: str, counts: list[int]
) -> None:
    if where == "help":
        shown = textwrap.dedent(help_text(capsys).split("NIfTI volumes or pictures:\n")[1])
    else:
        blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
        shown = next(block for block in blocks if "classes:" in block)
    rng = np.random.default_rng(0)
    for i in range(10):
        write_picture(tmp_path / "images" / f"{i}.png", rng.integers(0, 256, (12, 10)).astype(np.uint8))
        write_picture(tmp_path / "masks" / f"{i}.png", rng.integers(0, 2, (12, 10)).astype(np.uint8) * 255)
    (tmp_path / "data.yaml").write_text(shown, encoding="utf-8")
    out = tmp_path / "out"
    assert main(["prepare", str(tmp_path / "data.yaml"), "--out", str(out), "--image-size", "32"]) == 0
    assert capsys.readouterr().err == ""
    cache = Cache.open(out, verify=True)
    assert [len(ids) for ids in cache.splits.values()] == counts
    assert cache.classes == yaml.safe_load(shown)["classes"]
    assert set(np.unique(cache.labels)) == {0, 1}


@pytest.mark.parametrize("size", ["100", "0", "-32", "16"])
def test_image_sizes_are_checked_first(tmp_path: Path, capsys: pytest.CaptureFixture[str], size: str) -> None:
    for data in (["none.yaml"], ["acdc", "--source", "none"]):
        assert main(["prepare", *data, "--out", str(tmp_path / "out"), "--image-size", size]) == 2
        assert f"--image-size: got {size}, expected a multiple of 32, at least 32" in capsys.readouterr().err
