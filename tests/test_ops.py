"""Which backend a call takes, and what it says where that is not the one a person would expect."""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from simmp_fast import limits, ops
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
        assert choose_backend("auto", CUDA, too_large=lambda: "got 40 classes") == "portable"
    assert "not float64" in caplog.text
    assert "got 40 classes" in caplog.text
    with pytest.raises(BackendError, match="got 40 classes"):
        choose_backend("triton", CUDA, too_large=lambda: "got 40 classes")


@needs_triton
@pytest.mark.parametrize("capability", [(9, 0)], indirect=True)
def test_what_is_rather_left_to_portable_still_runs_where_it_is_asked_for(
    capability: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ops, "_why_no_room", lambda *_: None)
    choose = functools.partial(choose_backend, operator="context_attention")
    with caplog.at_level(logging.WARNING, logger="simmp_fast"):
        assert choose("auto", CUDA, torch.float32) == "portable"
    assert "takes portable: context_attention in float32" in caplog.text
    assert choose("auto", CUDA, torch.float32, products=torch.bfloat16) == "triton"
    assert choose("triton", CUDA, torch.float32) == "triton"
    assert choose_backend("auto", CUDA, torch.float32, operator="powerset_loss") == "triton"


@pytest.fixture
def small_gpu(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[None]:
    """A GPU of capability 9.0 with so much shared memory a block."""
    configs = pytest.importorskip("simmp_fast.kernels.configs", exc_type=ImportError)
    monkeypatch.setattr(ops, "_find_capability", lambda _: (9, 0))
    monkeypatch.setattr(configs, "device_limits", lambda _: ((9, 0), request.param))
    ops._find_unserved.cache_clear()
    ops._log_once.cache_clear()
    yield
    ops._find_unserved.cache_clear()


@needs_triton
@pytest.mark.parametrize("small_gpu", [100 * 1024], indirect=True)
def test_a_gpu_with_room_has_a_configuration_for_all(small_gpu: None) -> None:
    for operator, kernels in limits.LAUNCHES.items():
        widths = functools.partial(dict.fromkeys, kernels, 10**9)
        for dtype in (torch.bfloat16, torch.float32):
            assert choose_backend("triton", CUDA, dtype, operator=operator, widths=widths) == "triton"


@needs_triton
@pytest.mark.parametrize("small_gpu", [50 * 1024], indirect=True)
def test_where_no_configuration_fits_auto_takes_portable(small_gpu: None, caplog: pytest.LogCaptureFixture) -> None:
    def choose(dim: int, backend: str = "auto") -> str:
        return choose_backend(
            backend, CUDA, torch.bfloat16, operator="memory_context_attention", widths=lambda: {"dim": dim}
        )

    with caplog.at_level(logging.WARNING, logger="simmp_fast"):
        assert [choose(dim) for dim in (96, 128, 129, 256)] == ["triton", "triton", "portable", "portable"]
    assert "no configuration of memory_context_forward fits the shared memory of cuda:0" in caplog.text
    with pytest.raises(BackendError, match="no configuration of memory_context_forward"):
        choose(192, "triton")


def _all_operators(backend: str, query: Tensor, memory: Tensor, prototypes: Tensor, x: Tensor, label: Tensor) -> Any:
    """Every operator once, through the door."""
    cluster = ops.assign_clusters(query, prototypes, backend=backend)
    context = ops.context_attention(query, query, query, backend=backend)
    recalled, _ = ops.memory_attention(query, memory, prototypes, cluster, backend=backend)
    both, _ = ops.memory_context_attention(query, query, context + recalled, memory, prototypes, backend=backend)
    bank = ops.update_memory(both, memory, prototypes, 2, backend=backend)
    score = ops.window_similarity(x, 2, backend=backend)
    weights = ops.decay_weights(score, (4, 4), 2, 0.8, "paper", torch.float32, backend=backend)
    split = ops.split_threshold(query, both, backend=backend)
    attended = ops.split_attention(query, both, both, *split, backend=backend)
    return *bank, weights, attended, ops.powerset_loss([x, x], label, backend=backend)


def _inputs(device: str, batch: int = 2) -> tuple[Tensor, ...]:
    def made(*shape: int) -> Tensor:
        return torch.ones(shape, device=device).requires_grad_()

    label = torch.zeros(batch, 4, 4, dtype=torch.int64, device=device)
    return made(batch, 5, 8), made(3, 4, 8).detach(), made(3, 8).detach(), made(batch, 3, 4, 4), label


def _graphs(backend: str, *calls: tuple[Tensor, ...]) -> tuple[list[torch.fx.GraphModule], Any]:
    """The graphs made for some calls, one after the other, and the result of the last."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(functools.partial(_all_operators, backend), backend=keep)
    return graphs, [compiled(*inputs) for inputs in calls][-1]


def test_the_door_breaks_no_compiled_graph() -> None:
    torch._dynamo.reset()
    found = torch._dynamo.explain(_all_operators)("auto", *_inputs("cpu"))
    assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons


@needs_triton
@pytest.mark.parametrize("small_gpu", [227 * 1024], indirect=True)
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_the_kernels_behind_the_door_are_one_compiled_graph(small_gpu: None, backend: str) -> None:
    """On tensors that say they are on a GPU: nothing is launched."""
    with FakeTensorMode():
        graphs, result = _graphs(backend, _inputs("cuda:0"))
    assert len(graphs) == 1
    called = {str(node.target).split(".")[1] for node in graphs[0].graph.nodes if "simmp_fast." in str(node.target)}
    left = limits.FLOAT32_TAKES_PORTABLE if backend == "auto" else set()
    assert called == set(limits.LAUNCHES) - left
    assert {x.device.type for x in result} == {"cuda"}


@needs_triton
@pytest.mark.parametrize("small_gpu", [227 * 1024], indirect=True)
def test_two_graphs_at_most_hold_the_kernels_for_all_batch_sizes(small_gpu: None) -> None:
    with FakeTensorMode():
        graphs, _ = _graphs("triton", *(_inputs("cuda:0", batch) for batch in range(2, 9)))
    assert len(graphs) <= 2


def test_more_classes_than_the_kernels_take_still_have_a_loss() -> None:
    heads = [torch.randn(1, 40, 4, 4, requires_grad=True)]
    ops.powerset_loss(heads, torch.zeros(1, 8, 8, dtype=torch.int64)).backward()
    with pytest.raises(BackendError):
        ops.powerset_loss(heads, torch.zeros(1, 8, 8, dtype=torch.int64), backend="triton")
