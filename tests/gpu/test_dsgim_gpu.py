"""The DS-GIM and loss kernels on a GPU: parity, repeats, memory, offsets past 2^31, CUDA graphs, a second device."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import case_names, check_case, check_inputs
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
from dsgim_cases import register

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is present"),
    pytest.mark.usefixtures("fresh_memory_is_nan"),
    pytest.mark.filterwarnings("ignore:.*does not have a deterministic implementation:UserWarning"),
]
pytest.importorskip("triton")
register()

OPERATORS = ("window_similarity", "decay_weights", "split_threshold", "split_attention", "powerset_loss")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HEADS = (7, 14, 28, 56)  # the network's four heads at 224x224


@pytest.fixture
def kernels() -> Any:
    from simmp_fast import kernels

    return kernels


def tokens(count: int, channels: int, dtype: torch.dtype, batch: int = 2, device: str = "cuda") -> list[Tensor]:
    generator = torch.Generator().manual_seed(count + channels)
    made = [torch.randn(batch, count, channels, generator=generator) for _ in range(3)]
    scale = channels**-0.25
    query, key, value = made[0] * scale, made[1] * scale + 0.5, made[2]
    return [x.to(device, dtype).requires_grad_() for x in (query, key, value)]


def logits(
    dtype: torch.dtype, sides: tuple[int, ...] = HEADS, classes: int = 9, batch: int = 2, device: str = "cuda"
) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(classes)
    made = [torch.randn(batch, classes, s, s, generator=generator).to(device, dtype).requires_grad_() for s in sides]
    return made, torch.randint(0, classes, (batch, 256, 256), generator=generator).to(device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("operator", "name"), [(o, n) for o in OPERATORS for n in case_names(o)])
def test_parity_on_the_edge_grid(kernels: Any, operator: str, name: str, dtype: torch.dtype) -> None:
    check_case(operator, getattr(kernels, operator), name, dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize("variant", ["paper", "released"])
@pytest.mark.parametrize("count", [196, 1025])
def test_parity_at_the_networks_channels(
    kernels: Any, count: int, variant: str, precision: str, dtype: torch.dtype
) -> None:
    if precision == "high" and dtype != torch.float32:
        pytest.skip("TF32 concerns float32 alone")
    query, key, value = (x.detach() for x in tokens(count, 384, dtype))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        check_inputs("split_threshold", kernels.split_threshold, {"query": query, "key": key}, f"split {count}")
        row_mean, threshold = kernels.split_threshold(query, key)
        inputs = {"query": query, "key": key, "value": value, "row_mean": row_mean, "threshold": threshold}
        check_inputs("split_attention", kernels.split_attention, inputs | {"variant": variant}, f"attention {count}")
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("classes", "sides"), [(9, HEADS), (4, HEADS), (2, (256,) * 4), (32, (64, 128) * 3)], ids=str)
def test_loss_at_the_networks_heads(kernels: Any, classes: int, sides: tuple[int, ...], dtype: torch.dtype) -> None:
    made, label = logits(dtype, sides, classes)
    inputs = {"heads": [head.detach() for head in made], "label": label}
    check_inputs("powerset_loss", kernels.powerset_loss, inputs, f"loss {classes} {sides}")


def results(kernels: Any, parts: list[Tensor], made: list[Tensor], label: Tensor) -> list[Tensor]:
    """Everything one pass through the operators gives, gradients included."""
    query, key, value = parts
    image = value.detach().mT.unflatten(2, (14, -1))
    score = kernels.window_similarity(image, 7)
    weights = kernels.decay_weights(score, tuple(image.shape[2:]), 7, 0.8, "paper", value.dtype)
    split = kernels.split_threshold(query, key)
    output = kernels.split_attention(query, key, value, *split)
    loss = kernels.powerset_loss(made, label)
    gradients = torch.autograd.grad([output, loss], [*parts, *made], [output.detach(), torch.ones_like(loss)])
    return [score, weights, *split, output.detach(), loss.detach(), *gradients]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_hundred_repeats_are_bitwise_equal(kernels: Any, dtype: torch.dtype) -> None:
    parts, (made, label) = tokens(392, 384, dtype), logits(dtype)
    first = results(kernels, parts, made, label)
    for _ in range(200):
        assert all(torch.equal(a, b) for a, b in zip(first, results(kernels, parts, made, label), strict=True))


def peak(function: Any) -> int:
    """Bytes that a call allocates at its peak, beyond what is there."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def test_memory_is_linear(kernels: Any) -> None:
    def attention(count: int) -> int:
        query, key, value = tokens(count, 384, torch.bfloat16)
        split = kernels.split_threshold(query, key)
        return peak(lambda: kernels.split_attention(query, key, value, *split).backward(value.detach()))

    assert attention(8192) < 4.5 * attention(2048)
    query, key, _ = tokens(4096, 384, torch.bfloat16)
    assert peak(lambda: kernels.split_threshold(query, key)) < 2 * 4096 * 4096
    made, label = logits(torch.float32, batch=8)
    assert peak(lambda: kernels.powerset_loss(made, label).backward()) < 8 * 9 * 256 * 256 * 4


@pytest.mark.alone
def test_offsets_past_two_to_the_31(kernels: Any, needs_memory: Callable[[int], None]) -> None:
    """The last image begins past 2^31 elements; its results equal those of the image alone."""
    count, channels = 12_544, 384
    images = 2**31 // (count * channels) + 2
    needs_memory(8 * images * count * channels * 2)
    alone = [x.detach() for x in tokens(count, channels, torch.bfloat16, batch=1)]
    query, key, value = (x.expand(images, -1, -1).contiguous() for x in alone)
    assert query.numel() > 2**31
    split, one = kernels.split_threshold(query, key), kernels.split_threshold(*alone[:2])
    assert all(torch.equal(a[-1], b[0]) for a, b in zip(split, one, strict=True))
    assert torch.equal(kernels.split_attention(query, key, value, *split)[-1], kernels.split_attention(*alone, *one)[0])
    wide, single = (x.mT.unflatten(2, (112, 112)) for x in (query, alone[0]))
    assert torch.equal(kernels.window_similarity(wide, 8)[-1], kernels.window_similarity(single, 8)[0])


def test_cuda_graph(kernels: Any) -> None:
    parts, (made, label) = tokens(196, 384, torch.bfloat16), logits(torch.bfloat16)
    expected = results(kernels, parts, made, label)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        results(kernels, parts, made, label)
    torch.cuda.current_stream().wait_stream(side)
    torch.use_deterministic_algorithms(False)  # filling fresh memory is not part of the graph
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = results(kernels, parts, made, label)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second CUDA device")
def test_second_device(kernels: Any) -> None:
    first, second = (
        results(kernels, tokens(196, 96, torch.bfloat16, device=d), *logits(torch.bfloat16, device=d))
        for d in ("cuda:0", "cuda:1")
    )
    assert torch.cuda.current_device() == 0
    for a, b in zip(first, second, strict=True):
        assert b.device.index == 1
        torch.testing.assert_close(a.cpu(), b.cpu())


def test_no_host_sync(kernels: Any) -> None:
    parts, (made, label) = tokens(1078, 64, torch.bfloat16), logits(torch.bfloat16)
    results(kernels, parts, made, label)
    torch.cuda.set_sync_debug_mode("error")
    try:
        results(kernels, parts, made, label)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.compiles
def test_compile_with_inductor(kernels: Any) -> None:
    query, key, value = tokens(196, 384, torch.bfloat16)
    made, label = logits(torch.bfloat16)

    def step() -> Tensor:
        return kernels.split_attention(query, key, value, *kernels.split_threshold(query, key)).float().mean() + (
            kernels.powerset_loss(made, label)
        )

    torch.testing.assert_close(torch.compile(step, fullgraph=True)(), step())
