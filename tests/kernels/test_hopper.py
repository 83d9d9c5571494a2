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

    def __init__(self, version: str) -> None:
        self.ptxas = types.SimpleNamespace(path=OLD, version=version)
        self.ptxas_blackwell = types.SimpleNamespace(path=NEW, version="13.1")

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        before = self.ptxas
        yield
        self.ptxas = before

    def assemble(self, source: str, metadata: object) -> str:
        return self.ptxas if isinstance(self.ptxas, str) else self.ptxas.path


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Tools]:
    """A Triton with one version of ptxas, and no hook."""
    found = Tools(request.param)
    runtime = types.SimpleNamespace(add_stages_inspection_hook=None, interpret=False)
    monkeypatch.setattr(hopper.triton, "knobs", types.SimpleNamespace(runtime=runtime, nvidia=found))
    monkeypatch.delenv(hopper.CHOSEN, raising=False)
    hopper._too_old.cache_clear()
    yield found
    hopper._too_old.cache_clear()


def compiled(tools: Tools, capability: int | None) -> tuple[str, str]:
    """What the last two stages of a compiler make under the mending."""
    stages = {"ptx": lambda source, metadata: PTX, "cubin": tools.assemble}
    with hopper.mended():
        hook = triton.knobs.runtime.add_stages_inspection_hook
        if hook is not None:
            hook("backend", stages, "options", "language", capability)
    return stages["ptx"]("", {}), stages["cubin"]("", {})


@pytest.mark.parametrize("tools", ["12.8"], indirect=True)
@pytest.mark.parametrize("capability", [90, 80, 100, None])
@pytest.mark.parametrize("fences", [True, False])
def test_only_hopper_is_mended(
    tools: Tools, capability: int | None, fences: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hopper, "FENCES_NEEDED", fences)
    ptx, assembler = compiled(tools, capability)
    assert ("fence.proxy.async" in ptx) == (fences and capability == 90)
    assert assembler == (NEW if capability == 90 else OLD)
    assert tools.ptxas.path == OLD, "only while a kernel is assembled"


@pytest.mark.parametrize("tools", ["12.8"], indirect=True)
def test_a_hook_that_was_there_is_kept(tools: Tools, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def before(*arguments: object) -> tuple[str, str] | None:
        seen.append(arguments)
        return None if arguments else ("their key", "their digest")

    triton.knobs.runtime.add_stages_inspection_hook = before
    compiled(tools, 90)
    assert len(seen) == 1
    with hopper.mended():
        key, digest = triton.knobs.runtime.add_stages_inspection_hook()
    assert key.startswith("their key")
    assert digest.startswith("their digest")
    assert "simmp_fast" in key
    assert triton.knobs.runtime.add_stages_inspection_hook is before


@pytest.mark.parametrize("tools", ["13.0"], indirect=True)
def test_an_assembler_that_is_named_later_is_judged_anew(tools: Tools, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "FENCES_NEEDED", False)
    assert compiled(tools, 90)[1] == OLD
    monkeypatch.setenv(hopper.CHOSEN, "PyTorch's")  # as Inductor does
    tools.ptxas = types.SimpleNamespace(path="PyTorch's", version="12.8")
    assert compiled(tools, 90)[1] == NEW


@pytest.mark.parametrize("tools", ["12.9", "13.0"], indirect=True)
def test_newer_compilers_are_left_alone(tools: Tools, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "FENCES_NEEDED", False)
    with hopper.mended():
        assert triton.knobs.runtime.add_stages_inspection_hook is None


@pytest.mark.parametrize("tools", ["12.8"], indirect=True)
def test_the_interpreter_asks_for_no_assembler(tools: Tools, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    monkeypatch.delattr(tools, "ptxas")
    with hopper.mended():
        assert triton.knobs.runtime.add_stages_inspection_hook is None
