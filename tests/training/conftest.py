"""Fixtures of the training tests."""

from __future__ import annotations

import pytest
import torch
from training_stubs import TinyModel, make_cache

from simmp_fast.data.cache import Cache
from simmp_fast.training import loop
from simmp_fast.training.views import RunPictures


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return make_cache(tmp_path_factory.mktemp("shapes") / "cache")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the child processes, whose results must be bitwise the same
    yield
    torch.set_num_threads(before)


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> type[TinyModel]:
    """Train the stub in place of the real network; without pictures, which take longer than it does."""
    monkeypatch.setattr(loop, "SimMPNet", TinyModel)
    if "with_pictures" not in request.fixturenames:
        monkeypatch.setattr(RunPictures, "draw", lambda *_, **__: None)
    return TinyModel


@pytest.fixture
def with_pictures() -> None:
    """Let a run with the stub draw its pictures."""
