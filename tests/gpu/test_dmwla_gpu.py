"""The DMW-LA kernels on a GPU: parity, repeatability, offsets past 2^31, CUDA graphs, a second device."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import case_names, check_assignment, check_case
from tf32 import Tf32Products
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
from dmwla_cases import OPERATORS, register

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is present"),
    pytest.mark.usefixtures("fresh_memory_is_nan"),
    pytest.mark.filterwarnings("ignore:.*does not have a deterministic implementation:UserWarning"),
]
pytest.importorskip("triton")
register()

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# The sixteen DMW-LA blocks of the network at 224x224: (tokens, head dim of the context, of the memory, clusters).
# Stages 1 and 2 and decoder level 1 may run their context in C dims; both widths are checked.
BLOCKS = [
    (3136, 96, 256, 9), (3136, 96, 256, 9), (784, 192, 256, 9), (784, 192, 256, 9),
    *[(196, 256, 256, 9)] * 6, (49, 256, 256, 9), (49, 256, 256, 9),
    (49, 128, 128, 10), (196, 128, 128, 10), (784, 128, 128, 10), (3136, 96, 128, 10),
]  # fmt: skip
SHAPES = sorted(set(BLOCKS))


@pytest.fixture
def kernels() -> Any:
    from simmp_fast import kernels

    return kernels


def made(
    tokens: int, dim: int, clusters: int, dtype: torch.dtype, batch: int = 2, slots: int = 100, device: str = "cuda"
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(tokens + dim)
    draw = lambda *s: torch.randn(s, generator=generator)  # noqa: E731
    query, key, value = (draw(batch, tokens, dim) * dim**-0.25 for _ in range(3))
    inputs = {"query": query, "key": key + 1, "value": value}
    return {n: t.to(device, dtype).requires_grad_() for n, t in inputs.items()} | {
        "memory": torch.rand(clusters, slots, dim, generator=generator).to(device),
        "prototypes": draw(clusters, dim).to(device),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("operator", "name"), [(o, n) for o in OPERATORS for n in case_names(o)])
def test_parity_on_the_edge_grid(kernels: Any, operator: str, name: str, dtype: torch.dtype) -> None:
    check_case(operator, getattr(kernels, operator), name, dtype, "cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", case_names("context_attention"))
def test_parity_of_the_fused_attention_of_pytorch(name: str, dtype: torch.dtype) -> None:
    """What portable takes on a GPU: a rival of the kernels, held to the same rule."""
    from simmp_fast import portable

    check_case("context_attention", portable.context_attention, name, dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parity_at_the_blocks_of_the_network(kernels: Any, shape: tuple, dtype: torch.dtype, precision: str) -> None:
    if precision == "high" and dtype != torch.float32:
        pytest.skip("TF32 concerns float32 alone")
    tokens, context_dim, memory_dim, clusters = shape
    from parity_cases import CASES

    def bank(m: Any, dim: int) -> dict[str, Tensor]:
        return {"memory": m.uniform(clusters, 100, dim), "prototypes": m.uniform(clusters, dim) - 0.5}

    def attention(m: Any, dim: int) -> dict[str, Tensor]:
        query, key = (m.normal(1, tokens, dim, scale=dim**-0.25) for _ in range(2))
        return {"query": query, "key": key, "value": m.normal(1, tokens, dim)}

    name = f"block_{tokens}_{context_dim}_{memory_dim}"
    CASES["context_attention"][name] = lambda m: attention(m, context_dim)
    CASES["memory_attention"][name] = lambda m: {"query": m.normal(1, tokens, memory_dim), **bank(m, memory_dim)}
    CASES["memory_context_attention"][name] = lambda m: attention(m, memory_dim) | bank(m, memory_dim)
    CASES["update_memory"][name] = lambda m: {
        "tokens": m.normal(4, tokens, memory_dim),
        **bank(m, memory_dim),
        "k": torch.tensor(50, device=m.device),
    }
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        with Tf32Products() if precision == "high" else nullcontext():
            for operator in ("context_attention", "memory_attention", "memory_context_attention"):
                check_case(operator, getattr(kernels, operator), name, dtype, "cuda")
        check_case("update_memory", kernels.update_memory, name, dtype, "cuda")
    finally:
        torch.set_float32_matmul_precision(before)


def results(kernels: Any, x: dict[str, Tensor]) -> list[Tensor]:
    """Output, gradients and the updated bank of one pass."""
    out, cluster = kernels.memory_context_attention(**x)
    leaves = [x["query"], x["key"], x["value"]]
    gradients = torch.autograd.grad(out, leaves, torch.ones_like(out) * x["value"].detach())
    bank = kernels.update_memory(x["key"], x["memory"], x["prototypes"], torch.tensor(50, device=out.device))
    return [out.detach(), cluster, *gradients, *bank]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_hundred_repeats_are_bitwise_equal(kernels: Any, dtype: torch.dtype) -> None:
    x = made(785, 96, 9, dtype, batch=4)
    first = results(kernels, x)
    for _ in range(200):
        assert all(torch.equal(a, b) for a, b in zip(first, results(kernels, x), strict=True))


@pytest.mark.alone
def test_offsets_past_two_to_the_31(kernels: Any, needs_memory: Callable[[int], None]) -> None:
    """The last image begins past 2^31 elements; its result equals that of the image alone."""
    tokens, dim = 12_545, 96
    images = 2**31 // (tokens * dim) + 2
    needs_memory(9 * images * tokens * dim * 2)
    x = made(tokens, dim, 3, torch.bfloat16, batch=1)
    wide = {n: x[n].detach().expand(images, -1, -1).contiguous() for n in ("query",)}
    query = wide["query"]
    assert query.numel() > 2**31
    alone, owner = kernels.memory_attention(x["query"].detach(), x["memory"], x["prototypes"])
    out, cluster = kernels.memory_attention(query, x["memory"], x["prototypes"])
    assert torch.equal(out[-1], alone[0])
    assert torch.equal(cluster[-1], owner[0])
    assert torch.equal(kernels.assign_clusters(query, x["prototypes"])[-1], owner[0])
    del out
    bank, _ = kernels.update_memory(query[-1:], x["memory"], x["prototypes"], 7)
    again, _ = kernels.update_memory(x["query"], x["memory"], x["prototypes"], 7)
    assert torch.equal(bank, again)


@pytest.mark.alone
def test_row_steps_past_two_to_the_31(kernels: Any, needs_memory: Callable[[int], None]) -> None:
    """A view whose rows are 2^26 elements apart."""
    needs_memory(41 * 2**26 * 2)
    base = torch.zeros(40 * 2**26, dtype=torch.float16, device="cuda")
    far = base.view(40, 2**26)[:, :16].unsqueeze(0)
    far.copy_(torch.randn(1, 40, 16))
    near = far.contiguous()
    assert torch.equal(kernels.context_attention(far, far, far), kernels.context_attention(near, near, near))


def test_cuda_graph(kernels: Any) -> None:
    x = made(196, 128, 10, torch.bfloat16)
    expected = results(kernels, x)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        results(kernels, x)
    torch.cuda.current_stream().wait_stream(side)
    torch.use_deterministic_algorithms(False)  # filling fresh memory is not part of the graph
    graph = torch.cuda.CUDAGraph()
    width = torch.tensor(50, device="cuda")
    with torch.cuda.graph(graph):
        out, cluster = kernels.memory_context_attention(**x)
        gradient = torch.autograd.grad(out, x["query"], torch.ones_like(out) * x["value"].detach())[0]
        bank, anchors = kernels.update_memory(x["key"].detach(), x["memory"], x["prototypes"], width)
    graph.replay()
    found = [out, cluster, gradient, bank, anchors]
    for a, b in zip(found, [*expected[:3], *expected[5:]], strict=True):
        assert torch.equal(a, b)
    width.fill_(25)  # the captured update reads k where it lies
    graph.replay()
    again, _ = kernels.update_memory(x["key"].detach(), x["memory"], x["prototypes"], 25)
    assert torch.equal(bank, again)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second CUDA device")
def test_second_device(kernels: Any) -> None:
    first, second = (results(kernels, made(133, 96, 5, torch.bfloat16, device=f"cuda:{i}")) for i in (0, 1))
    assert torch.cuda.current_device() == 0
    assert all(t.device.index == 1 for t in second)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a.cpu(), b.cpu())


def test_no_host_sync(kernels: Any) -> None:
    x = made(196, 128, 10, torch.bfloat16)
    results(kernels, x)
    width = torch.tensor(50, device="cuda")
    cotangent = torch.ones_like(x["query"])
    torch.cuda.set_sync_debug_mode("error")
    try:
        out, _ = kernels.memory_context_attention(**x)
        torch.autograd.grad(out, x["query"], cotangent)
        kernels.update_memory(x["key"], x["memory"], x["prototypes"], width)
        kernels.assign_clusters(x["query"], x["prototypes"], metric="dot")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matching_of_many_tokens(kernels: Any, dtype: torch.dtype) -> None:
    x = made(12_545, 256, 64, dtype)
    found = kernels.assign_clusters(x["query"].detach(), x["prototypes"])
    check_assignment("assign_clusters", x["query"].detach(), x["prototypes"], found, "cosine")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_step_that_is_no_number_harms_nothing(kernels: Any, dtype: torch.dtype) -> None:
    """Such a step is masked afterwards; until then its kernels must neither fail nor read what nobody wrote."""
    x = made(785, 96, 9, dtype)
    bad = x["key"].detach().clone()
    bad[1, 300:340, 5] = float("nan")
    owners = []
    for tokens in (bad, torch.full_like(bad, float("nan"))):
        owners.append(kernels.assign_clusters(tokens, x["prototypes"], metric="dot"))
        for _ in range(3):
            kernels.memory_context_attention(tokens, tokens, tokens, x["memory"], x["prototypes"])
            kernels.update_memory(tokens, x["memory"], x["prototypes"], torch.tensor(50, device="cuda"))
    torch.cuda.synchronize()
    assert int(torch.stack(owners).min()) >= 0
    assert int(torch.stack(owners).max()) < 9


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True)


@pytest.mark.compiles
def test_compile_with_inductor(kernels: Any) -> None:
    x = made(49, 128, 4, torch.bfloat16)
    eager, _ = kernels.memory_context_attention(**x)
    found, _ = compiled(kernels.memory_context_attention)(**x)
    assert torch.equal(found, eager)
