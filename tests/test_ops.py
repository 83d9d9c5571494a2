"""Which backend a call takes, and what it says where that is not the one a person would expect."""

from __future__ import annotations

import importlib.util
import logging

import pytest
import torch

from simmp_fast import ops
from simmp_fast.ops import BackendError, choose_backend

CUDA = torch.device("cuda", 0)
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@pytest.fixture
def capability(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.setattr(ops, "_capability", lambda _: request.param)
    ops._log_once.cache_clear()


def test_a_cpu_takes_portable() -> None:
    assert choose_backend("auto", torch.device("cpu")) == "portable"
    with pytest.raises(BackendError, match="'triton' cannot run here: the tensors are on cpu"):
        choose_backend("triton", torch.device("cpu"))


@needs_triton
@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0), (12, 0)], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_auto_takes_triton_on_cuda(capability: None, dtype: torch.dtype) -> None:
    assert choose_backend("auto", CUDA, dtype) == "triton"
    assert choose_backend("portable", CUDA, dtype) == "portable"


@needs_triton
@pytest.mark.parametrize("capability", [(7, 5)], indirect=True)
def test_an_old_gpu_takes_portable_and_says_so_once(capability: None, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="simmp_fast"):
        assert [choose_backend("auto", CUDA) for _ in range(3)] == ["portable"] * 3
    assert [record.getMessage() for record in caplog.records] == [
        "backend 'auto' takes portable: the GPU has compute capability 7.5, the kernels need 8.0 or newer"
    ]
    with pytest.raises(BackendError, match=r"compute capability 7\.5"):
        choose_backend("triton", CUDA)


@needs_triton
@pytest.mark.parametrize("capability", [(9, 0)], indirect=True)
def test_what_the_kernels_cannot_take_goes_to_portable(capability: None, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="simmp_fast"):
        assert choose_backend("auto", CUDA, torch.float64) == "portable"
        assert choose_backend("auto", CUDA, too_large="got 40 classes") == "portable"
    assert "not float64" in caplog.text
    assert "got 40 classes" in caplog.text
    with pytest.raises(BackendError, match="got 40 classes"):
        choose_backend("triton", CUDA, too_large="got 40 classes")


@pytest.mark.parametrize(("channels", "clusters", "needs"), [(256, 64, None), (257, 3, "257 ch"), (8, 65, "65 cl")])
def test_limits_of_the_kernels(channels: int, clusters: int, needs: str | None) -> None:
    found = ops._wide(torch.zeros(1, 2, channels), torch.zeros(clusters, channels))
    assert found is None if needs is None else needs in str(found)


def test_more_classes_than_the_kernels_take_still_have_a_loss() -> None:
    heads = [torch.randn(1, 40, 4, 4, requires_grad=True)]
    ops.powerset_loss(heads, torch.zeros(1, 8, 8, dtype=torch.int64)).backward()
    with pytest.raises(BackendError):
        ops.powerset_loss(heads, torch.zeros(1, 8, 8, dtype=torch.int64), backend="triton")
