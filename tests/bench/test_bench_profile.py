"""The profile of a step: what it makes of kernels that overlap and pause, and that it runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import profile
from bench.profile import Gap, Interval


def test_kernels_and_gaps() -> None:
    found = profile.summarise(
        [
            Interval("a", 0, 10),
            Interval("b", 5, 8),  # inside a, in another stream
            Interval("c", 18, 20),
            Interval("a", 20, 40),
            Interval("d", 41, 42),
        ],
        steps=2,
    )
    assert found.span_ms == pytest.approx(42e-3 / 2)
    assert found.busy_ms == pytest.approx((10 + 2 + 20 + 1) * 1e-3 / 2)
    assert found.gaps == [Gap(8, "a", "c"), Gap(1, "a", "d")]
    assert [(k.name, k.calls, pytest.approx(k.ms)) for k in found.kernels] == [
        ("a", 1, 15e-3), ("b", 0.5, 1.5e-3), ("c", 0.5, 1e-3), ("d", 0.5, 0.5e-3),
    ]  # fmt: skip
    assert found.kernels[0].share == pytest.approx(30 / 33)


def test_a_trace_of_a_gpu() -> None:
    def event(name: str, start: float, took: float, category: str, **arguments: object) -> dict[str, object]:
        return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": took, "args": arguments}

    trace = [
        {"ph": "M", "name": "process_name", "ts": 0, "args": {"name": "python"}},
        event("cudaGraphLaunch", 0, 90, "cuda_runtime"),
        event("attention_forward", 10, 4, "kernel", grid=[500, 1, 1], block=[256, 1, 1]),
        event("attention_forward", 14, 1, "kernel", grid=[20, 2, 1], block=[256, 1, 1]),
        event("Memcpy DtoD", 15, 2, "gpu_memcpy", bytes=8),
    ]
    found = profile.summarise(profile.traced({"traceEvents": trace}), steps=1)
    assert [(k.name, k.blocks, pytest.approx(k.ms)) for k in found.kernels] == [
        ("attention_forward", 500, 4e-3), ("Memcpy DtoD", 0, 2e-3), ("attention_forward", 40, 1e-3),
    ]  # fmt: skip


def test_nothing_ran() -> None:
    with pytest.raises(ValueError, match="intervals: got none"):
        profile.summarise([], 1)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results"
    command = ["--device", "cpu", "--side", "64", "--batch", "2", "--steps", "2", "--out", str(out)]
    assert profile.main(command) == 0
    text = (out / "profile.md").read_text()
    assert capsys.readouterr().out.strip() == text.strip()
    assert text.startswith("# Training step, portable, float32, batch 2")
    kernels = json.loads((out / "profile.json").read_text())["kernels"]
    assert len(kernels) > profile.SHOWN_KERNELS
    assert any("convolution" in kernel["name"] for kernel in kernels)
    assert text.count("\n| `") == profile.SHOWN_KERNELS
    assert kernels == sorted(kernels, key=lambda kernel: -kernel["ms"])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--backend triton-fast", "'triton-fast' cannot run here"),
        ("--backend quick", "got 'quick', expected some of reference"),
        ("--steps 0", "--steps: got 0, expected at least 1"),
    ],
)
def test_wrong_arguments(option: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert profile.main([*option.split(), "--device", "cpu"]) == 2
    assert message in capsys.readouterr().err
