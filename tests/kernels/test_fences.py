"""Fences that a compiler leaves out: where they go, and which kernels get them."""

from __future__ import annotations

import types

import pytest

triton = pytest.importorskip("triton")

from simmp_fast.kernels import fences  # noqa: E402

PTX = "\tcp.async.commit_group;\n\tcp.async.wait_group \t1;\n\tbar.sync \t0;\n"


def test_a_fence_stands_between_the_wait_and_the_barrier() -> None:
    lines = [line.split()[0] for line in fences.with_fences(PTX).splitlines()]
    assert lines == ["cp.async.commit_group;", "cp.async.wait_group", "fence.proxy.async.shared::cta;", "bar.sync"]


@pytest.mark.parametrize(("capability", "fenced"), [(90, True), (80, False), (100, False), (None, False)])
def test_only_hopper_gets_it_and_a_hook_that_was_there_is_kept(
    monkeypatch: pytest.MonkeyPatch, capability: int | None, fenced: bool
) -> None:
    seen = []
    knobs = types.SimpleNamespace(runtime=types.SimpleNamespace(add_stages_inspection_hook=lambda *a: seen.append(a)))
    before = knobs.runtime.add_stages_inspection_hook
    monkeypatch.setattr(fences.triton, "knobs", knobs)
    monkeypatch.setattr(fences, "NEEDED", True)
    stages = {"ptx": lambda source, metadata: PTX}
    with fences.fenced():
        knobs.runtime.add_stages_inspection_hook("backend", stages, "options", "language", capability)
    assert len(seen) == 1
    assert ("fence.proxy.async" in stages["ptx"]("", {})) == fenced
    assert knobs.runtime.add_stages_inspection_hook is before


def test_newer_compilers_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fences, "NEEDED", False)
    monkeypatch.setattr(fences.triton, "knobs", None)
    with fences.fenced():
        pass
