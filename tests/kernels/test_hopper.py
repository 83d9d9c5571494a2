"""What is done about the compilers' faults on Hopper: where fences go, which assembler is taken, for which kernels."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator

import pytest

triton = pytest.importorskip("triton")

from simmp_fast.kernels import hopper  # noqa: E402

PTX = "\tcp.async.commit_group;\n\tcp.async.wait_group \t1;\n\tbar.sync \t0;\n"
OLD, NEW = "ptxas of the wheel", "newer ptxas of the wheel"


def test_a_fence_stands_between_the_wait_and_the_barrier() -> None:
    lines = [line.split()[0] for line in hopper.with_fences(PTX).splitlines()]
    assert lines == ["cp.async.commit_group;", "cp.async.wait_group", "fence.proxy.async.shared::cta;", "bar.sync"]


class Tools:
    """Triton's settings, as far as they are used."""

    ptxas = OLD
    ptxas_blackwell = types.SimpleNamespace(path=NEW)

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        before = self.ptxas
        yield
        self.ptxas = before


@pytest.mark.parametrize(("capability", "mended"), [(90, True), (80, False), (100, False), (None, False)])
def test_only_hopper_is_mended_and_a_hook_that_was_there_is_kept(
    monkeypatch: pytest.MonkeyPatch, capability: int | None, mended: bool
) -> None:
    seen = []
    tools = Tools()
    runtime = types.SimpleNamespace(add_stages_inspection_hook=lambda *a: seen.append(a))
    before = runtime.add_stages_inspection_hook
    monkeypatch.setattr(hopper.triton, "knobs", types.SimpleNamespace(runtime=runtime, nvidia=tools))
    monkeypatch.setattr(hopper, "NEEDED", True)
    monkeypatch.delenv(hopper.CHOSEN, raising=False)
    stages = {"ptx": lambda source, metadata: PTX, "cubin": lambda source, metadata: tools.ptxas}
    with hopper.mended():
        runtime.add_stages_inspection_hook("backend", stages, "options", "language", capability)
    assert len(seen) == 1
    assert ("fence.proxy.async" in stages["ptx"]("", {})) == mended
    assert stages["cubin"]("", {}) == (NEW if mended else OLD)
    assert tools.ptxas == OLD, "only while a kernel is assembled"
    assert runtime.add_stages_inspection_hook is before


def test_an_assembler_that_the_user_names_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    tools = Tools()
    monkeypatch.setattr(hopper.triton, "knobs", types.SimpleNamespace(nvidia=tools))
    monkeypatch.setenv(hopper.CHOSEN, "/opt/ptxas")
    assert hopper.newer_assembler(lambda source, metadata: tools.ptxas)("", {}) == OLD


def test_newer_compilers_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "NEEDED", False)
    monkeypatch.setattr(hopper.triton, "knobs", None)
    with hopper.mended():
        pass
