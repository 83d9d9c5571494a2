"""What the portable operators promise beside their values: gradients, dtypes, memory, errors, repeatability."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from no_sync import LargestTensor
from parity import build, named_gradients
from torch import Tensor

from simmp_fast import portable, reference

CHUNKED = sys.modules["simmp_fast.portable.chunked_attention"]
SPLIT = sys.modules["simmp_fast.portable.split_attention"]
LOSS = sys.modules["simmp_fast.portable.powerset_loss"]
BFLOAT16 = torch.bfloat16


def leaves(inputs: dict[str, Any], *names: str) -> list[Tensor]:
    return [inputs[name].requires_grad_() for name in names]


# --- gradients ------------------------------------------------------------------------------------


def test_gradcheck_attention() -> None:
    x = build("memory_context_attention", "odd", seed=0, dtype=torch.float64, device="cpu")
    x = {name: value[:, :7] if name in ("query", "key", "value") else value for name, value in x.items()}
    cluster = portable.assign_clusters(x["query"], x["prototypes"])
    bank = (x["memory"], x["prototypes"], cluster)
    tokens = [t.detach().requires_grad_() for t in (x["query"], x["key"], x["value"])]
    assert torch.autograd.gradcheck(lambda *t: portable.memory_context_attention(*t, *bank)[0], tokens)


def test_gradcheck_chunked_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CHUNKED, "CHUNK", 4)
    x = build("context_attention", "small_dim", seed=0, dtype=torch.float64, device="cpu")
    tokens = [x[name][:, :10].detach().requires_grad_() for name in ("query", "key", "value")]
    assert torch.autograd.gradcheck(CHUNKED.chunked_attention, tokens)


@pytest.mark.parametrize("variant", ["paper", "released"])
@pytest.mark.parametrize("chunked", [False, True])
def test_gradcheck_split_attention(variant: str, chunked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if chunked:
        monkeypatch.setattr(SPLIT, "DIRECT_UP_TO", 0)
        monkeypatch.setattr(SPLIT, "CHUNK_SCORES", 0)
    x = build("split_attention", "small_dim_paper", seed=0, dtype=torch.float64, device="cpu")
    tokens = [x[name][:, :19].detach().requires_grad_() for name in ("query", "key", "value")]
    split = x["row_mean"][:, :19], x["threshold"][:, :19]
    assert torch.autograd.gradcheck(lambda *t: portable.split_attention(*t, *split, variant=variant), tokens)


def test_gradcheck_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LOSS, "CPU_CHUNK", 20)
    generator = torch.Generator().manual_seed(0)
    heads = [
        torch.randn(2, 3, h, w, generator=generator, dtype=torch.float64, requires_grad=True)
        for h, w in ((1, 2), (3, 5), (6, 4), (6, 7))
    ]
    label = torch.randint(3, (2, 6, 7), generator=generator)
    assert torch.autograd.gradcheck(lambda *h: portable.powerset_loss(h, label), heads)


def test_second_derivative_is_refused_clearly() -> None:
    x = build("powerset_loss", "one_head", seed=0, dtype=torch.float32, device="cpu")
    head = x["heads"][0].requires_grad_()
    (gradient,) = torch.autograd.grad(portable.powerset_loss([head], x["label"]), head, create_graph=True)
    with pytest.raises(RuntimeError, match="powerset_loss_backward"):
        gradient.sum().backward()


def test_constants_get_no_gradient() -> None:
    x = build("memory_attention", "odd", seed=0, dtype=torch.float32, device="cpu")
    query, memory, prototypes = leaves(x, "query", "memory", "prototypes")
    portable.memory_attention(query, memory, prototypes)[0].sum().backward()
    assert query.grad is not None
    assert memory.grad is None
    assert prototypes.grad is None


# --- dtypes ---------------------------------------------------------------------------------------


def products(dtype: torch.dtype) -> list[tuple[str, str, torch.dtype]]:
    cases = [(operator, case) for operator in ("context_attention", "memory_attention") for case in ("odd", "long")]
    cases += [("memory_context_attention", "odd"), ("split_attention", "odd_paper"), ("split_attention", "long_paper")]
    return [(*case, dtype) for case in cases]


@pytest.mark.parametrize(("operator", "case", "expected"), products(BFLOAT16))
def test_autocast_decides_the_dtype_of_products(operator: str, case: str, expected: torch.dtype) -> None:
    inputs = build(operator, case, seed=0, dtype=torch.float32, device="cpu")
    with torch.autocast("cpu", dtype=BFLOAT16):
        got, gradients, _ = named_gradients(operator, getattr(portable, operator), inputs)
        own, own_gradients, _ = named_gradients(operator, getattr(reference, operator), inputs)
    assert got.dtype == own.dtype == expected
    torch.testing.assert_close(got, own, rtol=0.05, atol=0.05)
    for name, gradient in gradients.items():
        assert gradient.dtype == own_gradients[name].dtype
        torch.testing.assert_close(gradient, own_gradients[name], rtol=0.1, atol=0.1)


def test_choices_and_sums_ignore_autocast() -> None:
    clusters = build("assign_clusters", "long_cosine", seed=0, dtype=torch.float32, device="cpu")
    split = build("split_threshold", "196_tokens", seed=0, dtype=torch.float32, device="cpu")
    loss = build("powerset_loss", "native", seed=0, dtype=torch.float32, device="cpu")
    plain = [portable.assign_clusters(**clusters), *portable.split_threshold(**split), portable.powerset_loss(**loss)]
    with torch.autocast("cpu", dtype=BFLOAT16):
        cast = [
            portable.assign_clusters(**clusters),
            *portable.split_threshold(**split),
            portable.powerset_loss(**loss),
        ]
    for before, under in zip(plain, cast, strict=True):
        assert before.dtype == under.dtype
        assert torch.equal(before, under)


@pytest.mark.parametrize("width", [1, 5, 16, 37, 64])
def test_equal_slots_are_written_in_rising_order(width: int) -> None:
    """Every slot five times: with k = M / 5 each written slot is the first free one of its equals."""
    generator = torch.Generator().manual_seed(width)
    memory = torch.rand(3, 7, width, generator=generator).repeat(1, 5, 1)
    tokens = torch.randn(1, 90, width, generator=generator)
    cluster = torch.arange(90).remainder(3).view(1, 90)
    updated, _ = portable.update_memory(tokens, memory, memory.mean(1), 11, cluster=cluster)
    written = (updated != memory).any(-1).view(3, 5, 7)
    assert (written.int().diff(dim=1) <= 0).all()
    assert (written.sum((1, 2)) == 11).all()


# --- memory ---------------------------------------------------------------------------------------


def tokens_of(count: int) -> dict[str, Any]:
    return {name: torch.randn(1, count, 16) for name in ("query", "key", "value")}


def inputs_of_size(operator: str, size: int) -> dict[str, Any]:
    if operator == "context_attention":
        return tokens_of(size)
    if operator == "memory_attention":
        return {"query": torch.randn(1, size, 16), "memory": torch.rand(4, 20, 16), "prototypes": torch.rand(4, 16)}
    if operator == "split_attention":
        return {**tokens_of(size), "row_mean": torch.randn(1, size), "threshold": torch.rand(1, size)}
    heads = [torch.randn(1, 3, size // 64, 16), torch.randn(1, 3, size // 8, 64)]
    return {"heads": heads, "label": torch.randint(3, (1, size // 8, 64))}


@pytest.mark.parametrize("operator", ["context_attention", "memory_attention", "split_attention", "powerset_loss"])
def test_no_tensor_grows_faster_than_the_tokens(operator: str) -> None:
    """Forward and backward: no ``[N, N]``, no ``[T, K, D]`` and no ``[T, M, D]`` at any time."""
    largest = []
    for size in (1536, 3072):
        with LargestTensor() as record:
            named_gradients(operator, getattr(portable, operator), inputs_of_size(operator, size))
        largest.append(record.elements)
    assert largest[1] <= 2.1 * largest[0]
    if operator == "memory_attention":
        assert largest[1] < 3072 * 4 * 16


def test_channels_first_tokens_hold_no_scores() -> None:
    inputs = {name: x.mT.contiguous().mT for name, x in tokens_of(1536).items()}
    with LargestTensor() as record:
        named_gradients("context_attention", portable.context_attention, inputs, expand=True)
    assert record.elements < 1536 * 1536


@pytest.mark.parametrize("operator", ["context_attention", "split_attention"])
def test_the_measure_sees_a_score_matrix(operator: str) -> None:
    with LargestTensor() as record:
        getattr(reference, operator)(**inputs_of_size(operator, 1100))
    assert record.elements == 1100**2


# --- repeatability --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operator", "case"),
    [
        ("context_attention", "long"),
        ("memory_attention", "long"),
        ("split_attention", "long_paper"),
        ("powerset_loss", "many_chunks"),
    ],
)
def test_repeats_bit_for_bit(operator: str, case: str) -> None:
    inputs = build(operator, case, seed=3, dtype=torch.float32, device="cpu")
    runs = [named_gradients(operator, getattr(portable, operator), inputs) for _ in range(3)]
    for output, gradients, _ in runs[1:]:
        assert torch.equal(output, runs[0][0])
        assert all(torch.equal(gradient, runs[0][1][name]) for name, gradient in gradients.items())


def test_wrong_arguments_say_what_is_needed() -> None:
    x = build("memory_attention", "odd", seed=0, dtype=torch.float32, device="cpu")
    with pytest.raises(ValueError, match=r"prototypes: got shape \[3, 18\], expected \[K=3, D=19\]"):
        portable.memory_attention(x["query"], x["memory"], x["prototypes"][:, :-1])
    with pytest.raises(ValueError, match="k: got 12, expected 1 to 11"):
        portable.update_memory(x["query"], x["memory"], x["prototypes"], 12)
