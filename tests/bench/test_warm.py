"""Archives of compiled kernels: what is in them, where they are unpacked, and that a launch finds its kernel there."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import nullgpu, warm
from bench.lease.record import read

pytest.importorskip("triton")

ABOUT = {"capability": [9, 0], "python": "3.12", "triton_key": "a"}
LAUNCH = """
import torch
from simmp_fast import kernels
kernels.assign_clusters(torch.randn(1, 64, 32, device="cuda"), torch.randn(4, 32, device="cuda"))
torch.cuda.synchronize()
"""


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache as Triton leaves it: a kernel with all its stages, and a launcher."""
    kernel, launcher = tmp_path / "cache" / "KERNEL", tmp_path / "cache" / "LAUNCHER"
    kernel.mkdir(parents=True)
    launcher.mkdir()
    names = ["k.cubin", "k.ptx", "k.ttir", "k.json"]
    for name in names:
        (kernel / name).write_text(f"content of {name}")
    paths = {name: str(kernel / name) for name in names}
    (kernel / "__grp__k.json").write_text(json.dumps({"child_paths": paths}))
    (launcher / "launcher.so").write_bytes(b"\x7fELF")
    return tmp_path / "cache"


def test_an_archive_holds_what_a_launch_reads_and_no_path(cache: Path, tmp_path: Path) -> None:
    file = tmp_path / "warm.tar.xz"
    size = warm.pack(cache, file, ABOUT)
    assert size == file.stat().st_size
    with tarfile.open(file) as bundle:
        contents = {member.name: bundle.extractfile(member).read() for member in bundle}  # type: ignore[union-attr]
    known = {"manifest.json", "KERNEL/__grp__k.json", "KERNEL/k.cubin", "KERNEL/k.json", "LAUNCHER/launcher.so"}
    assert set(contents) == known
    assert not any(str(tmp_path).encode() in content for content in contents.values())
    first = file.read_bytes()
    warm.pack(cache, file, ABOUT)
    assert file.read_bytes() == first


def test_it_can_be_unpacked_anywhere(cache: Path, tmp_path: Path) -> None:
    file, target = tmp_path / "warm.tar.xz", tmp_path / "elsewhere"
    candidates = tmp_path / "candidates.jsonl"
    candidates.write_text("{}\n")
    warm.pack(cache, file, ABOUT, candidates)
    assert warm.unpack(file, target) == ABOUT
    paths = json.loads((target / "KERNEL" / "__grp__k.json").read_text())["child_paths"]
    assert {name: Path(path).read_text() for name, path in paths.items()} == {
        "k.cubin": "content of k.cubin",
        "k.json": "content of k.json",
    }
    assert (target / "candidates.jsonl").read_text() == "{}\n"


@pytest.mark.parametrize("name", ["../outside", "/outside", "a/b/c"])
def test_nothing_is_written_outside(tmp_path: Path, name: str) -> None:
    file = tmp_path / "bad.tar.gz"
    with tarfile.open(file, "w:gz") as bundle:
        member = tarfile.TarInfo(name)
        member.size = 1
        bundle.addfile(member, io.BytesIO(b"x"))
    with pytest.raises(ValueError, match="not an archive of compiled kernels"):
        warm.unpack(file, tmp_path / "deep" / "target")
    assert not (tmp_path / "deep" / "outside").exists()


def test_what_is_no_archive_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").write_text("text")
    assert warm.main(["unpack", str(tmp_path / "text"), "--to", str(tmp_path / "to")]) == 2
    assert "not an archive of compiled kernels" in capsys.readouterr().err


def test_other_versions_are_named() -> None:
    here = {"python": "3.11", "triton_key": "a", "capability": [9, 0]}
    assert warm.differences(ABOUT, here) == ["python: made with 3.12, here is 3.11"]


@pytest.mark.skipif(
    torch.version.cuda is None or shutil.which(os.environ.get("CC", "cc")) is None,
    reason="the null GPU needs PyTorch with CUDA and a C compiler",
)
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels are not compiled")
def test_a_launch_from_an_unpacked_archive_compiles_nothing(tmp_path: Path) -> None:
    def launch(folder: Path) -> list[dict[str, Any]]:
        log = tmp_path / f"{folder.name}.jsonl"
        environment = nullgpu.environment() | {"TRITON_CACHE_DIR": str(folder), "NULLGPU_COMPILED": str(log)}
        done = subprocess.run([sys.executable, "-c", LAUNCH], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return list(read(log))

    (compiled,) = launch(tmp_path / "made")
    assert (compiled["kernel"], compiled["hit"]) == ("assign_clusters_kernel", False)
    warm.pack(tmp_path / "made", tmp_path / "warm.tar.xz", ABOUT)
    warm.unpack(tmp_path / "warm.tar.xz", tmp_path / "other" / "place")
    shutil.rmtree(tmp_path / "made")
    (found,) = launch(tmp_path / "other" / "place")
    assert (found["kernel"], found["hit"]) == ("assign_clusters_kernel", True)
