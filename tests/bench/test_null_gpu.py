"""The GPU that computes nothing: what a program sees of it, and what its tests may conclude."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import nullgpu

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    torch.version.cuda is None or shutil.which(os.environ.get("CC", "cc")) is None,
    reason="the null GPU needs PyTorch with CUDA and a C compiler",
)
ROOT = Path(__file__).parents[2]
PROGRAM = """
import torch
from bench import nullgpu

assert torch.cuda.get_device_name() == "null GPU sm_86" and torch.cuda.get_device_capability() == (8, 6)
held = torch.empty(2**20, device="cuda")
assert torch.cuda.memory_allocated() == 4 * 2**20
try:
    torch.empty(2**38, device="cuda")
except torch.OutOfMemoryError:
    pass
else:
    raise SystemExit("80 GB hold a terabyte")
torch.nn.Conv2d(3, 4, 3).cuda()(torch.ones(1, 3, 8, 8, device="cuda"))
held.exp2_()  # compiled by PyTorch at run time
known = torch.tensor([3, 4], device="cuda")
assert known.tolist() == [3, 4]
graph, before = torch.cuda.CUDAGraph(), nullgpu.counters()
with torch.cuda.graph(graph):
    held + 1
graph.replay()
graph.replay()
after = nullgpu.counters()
assert after["graph_launches"] - before["graph_launches"] == 2 and after["launches"] > before["launches"]
try:
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        float(held[0])
except RuntimeError as error:
    assert "capturing" in str(error)
else:
    raise SystemExit("a wait during a capture is no error")
print("seen")
"""
PLAYING = """
import torch
import torch.nn.functional as F
from bench import environment

assert environment.describe(torch.device("cuda"))["gpu"] == "null GPU by the name of NVIDIA H200"
x = torch.empty(2, 8, 16, 16, device="cuda").contiguous(memory_format=torch.channels_last).requires_grad_()
module = torch.nn.Conv2d(8, 16, 3, 2, 1).cuda()
y = module(x)
assert y.shape == (2, 16, 8, 8) and y.is_contiguous(memory_format=torch.channels_last)
normal = torch.nn.BatchNorm2d(16).cuda()(y)
gradients = torch.autograd.grad(normal.sum(), [x, *module.parameters()])
assert [g.shape for g in gradients] == [x.shape, module.weight.shape, module.bias.shape]
assert gradients[0].is_contiguous(memory_format=torch.channels_last)
query = torch.empty(2, 1, 64, 96, device="cuda", dtype=torch.bfloat16, requires_grad=True)
output = F.scaled_dot_product_attention(query, query, query)
assert "Cudnn" in type(output.grad_fn).__name__ and output.shape == query.shape
assert torch.autograd.grad(output.sum(), query)[0].shape == query.shape
print("seen")
"""
TESTS = """
import torch

def test_a_comparison():
    assert torch.equal(torch.zeros(1), torch.ones(1))
    assert 1 == 2

def test_a_crash():
    raise RuntimeError("cannot run")
"""


def test_what_a_program_sees(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, "-m", "bench.nullgpu", "--capability", "8.6", "python", str(program)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "seen\n", done.stderr


def test_it_plays_a_gpu_with_cudnn(tmp_path: Path) -> None:
    """What a compiled graph looks like depends on it."""
    program = tmp_path / "program.py"
    program.write_text(PLAYING)
    command = [sys.executable, "-m", "bench.nullgpu", "--plays", "NVIDIA H200", "python", str(program)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "seen\n", done.stderr


def test_results_are_not_judged_and_crashes_fail(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-p", "bench.nullgpu.unjudged", "-p", "no:cacheprovider", "-q"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, str(tmp_path)], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "1 failed, 1 passed" in done.stdout, done.stdout + done.stderr
    assert "cannot run" in done.stdout
    assert "not judged: test_it.py::test_a_comparison ended at line 6: assert 1 == 2" in done.stdout


def test_an_unknown_capability_is_named() -> None:
    with pytest.raises(nullgpu.NullGPUError, match=r"--capability: got 7\.5, expected one of 8\.0"):
        nullgpu.environment((7, 5))


def test_counters_want_the_null_gpu() -> None:
    with pytest.raises(nullgpu.NullGPUError, match="does not run on it"):
        nullgpu.counters()
