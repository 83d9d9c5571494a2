"""Every operator refuses wrong arguments with the argument's name, what it got and what it needs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from simmp_fast import ops, reference
from simmp_fast.validation import product_dtype

X = torch.zeros(2, 6, 4)
MEMORY, PROTOTYPES = torch.zeros(3, 5, 4), torch.zeros(3, 4)
SPLIT = torch.zeros(2, 6)
LABEL = torch.zeros(2, 8, 8, dtype=torch.int64)

CASES: list[tuple[Callable[..., object], tuple, dict, type[Exception], str]] = [
    (reference.assign_clusters, (X, torch.zeros(3, 5)), {}, ValueError, r"prototypes: got shape \[3, 5\].*D=4"),
    (reference.assign_clusters, (X.long(), PROTOTYPES), {}, TypeError, "query: got dtype torch.int64"),
    (reference.assign_clusters, (X, PROTOTYPES), {"metric": "l2"}, ValueError, "metric: got 'l2'.*'cosine', 'dot'"),
    (reference.assign_clusters, (X[0], PROTOTYPES), {}, ValueError, r"query: got shape \[6, 4\], expected \[B, N, D\]"),
    (reference.assign_clusters, (X, torch.zeros(0, 4)), {}, ValueError, "prototypes: got shape"),
    (reference.context_attention, (X, X[:, :5], X), {}, ValueError, r"key: got shape \[2, 5, 4\].*N=6"),
    (reference.context_attention, (X, X, X.half()), {}, TypeError, "value: got dtype torch.float16.*as query"),
    (reference.context_attention, (X, X, None), {}, TypeError, "value: got NoneType, expected a torch.Tensor"),
    (reference.context_attention, (X, X.to("meta"), X), {}, ValueError, "key: got device meta, expected cpu"),
    (reference.memory_attention, (X, MEMORY[..., :2], PROTOTYPES), {}, ValueError, "memory: got shape"),
    (reference.memory_attention, (X, MEMORY, PROTOTYPES[:2]), {}, ValueError, r"prototypes: got shape \[2, 4\].*K=3"),
    (reference.memory_attention, (X, MEMORY, PROTOTYPES, SPLIT), {}, TypeError, "cluster: got dtype torch.float32"),
    (reference.memory_attention, (X, MEMORY, PROTOTYPES, SPLIT[:1].long()), {}, ValueError, "cluster: got shape"),
    (reference.update_memory, (X, MEMORY, PROTOTYPES, 6), {}, ValueError, "k: got 6, expected 1 to 5"),
    (reference.update_memory, (X, MEMORY, PROTOTYPES, 2.0), {}, TypeError, "k: got float"),
    (reference.update_memory, (X, MEMORY, PROTOTYPES, torch.tensor([2])), {}, TypeError, "k: got a tensor"),
    (reference.update_memory, (X, MEMORY, PROTOTYPES, 2), {"rate": 1.5}, ValueError, "rate: got 1.5"),
    (reference.window_similarity, (torch.zeros(1, 2, 6, 6), 4), {}, ValueError, "window: got 4, expected a divisor"),
    (reference.split_threshold, (X, X[..., :2]), {}, ValueError, "key: got shape"),
    (reference.split_threshold, (X[:, :0], X[:, :0]), {}, ValueError, "at least one token"),
    (reference.split_attention, (X, X, X, SPLIT[:, :5], SPLIT), {}, ValueError, "row_mean: got shape"),
    (reference.split_attention, (X, X, X, SPLIT, SPLIT.double()), {}, TypeError, "threshold: got dtype"),
    (reference.split_attention, (X, X, X, SPLIT, SPLIT), {"variant": "x"}, ValueError, "variant: got 'x'"),
    (reference.powerset_loss, ([], LABEL), {}, TypeError, "heads: got list"),
    (reference.powerset_loss, ([torch.zeros(2, 3, 8, 8)] * 7, LABEL), {}, ValueError, "heads: got 7"),
    (reference.powerset_loss, ([torch.zeros(2, 3, 9, 8)], LABEL), {}, ValueError, r"heads\[0\]: got a grid of 9x8"),
    (reference.powerset_loss, ([torch.zeros(1, 3, 8, 8)], LABEL), {}, ValueError, r"heads\[0\]: got shape"),
    (reference.powerset_loss, ([torch.zeros(2, 3, 8, 8)], LABEL.float()), {}, TypeError, "label: got dtype"),
    (
        reference.powerset_loss,
        ([torch.zeros(2, 3, 8, 8), torch.zeros(2, 4, 8, 8)], LABEL),
        {},
        ValueError,
        r"heads\[1\]: got shape.*classes=3",
    ),
]


@pytest.mark.parametrize(("operator", "args", "kwargs", "error", "message"), CASES)
def test_wrong_argument(operator: Callable, args: tuple, kwargs: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        operator(*args, **kwargs)


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match="backend: got 'cuda', expected one of 'auto'"):
        ops.context_attention(X, X, X, backend="cuda")


def test_triton_is_refused_on_the_cpu_with_a_reason() -> None:
    with pytest.raises(ops.BackendError, match="'triton' cannot run here: "):
        ops.context_attention(X, X, X, backend="triton")


def test_the_door_leads_to_the_reference() -> None:
    x = torch.randn(2, 6, 4, dtype=torch.float64)
    assert torch.equal(ops.context_attention(x, x, x, backend="reference"), reference.context_attention(x, x, x))


@pytest.mark.parametrize(
    ("dtype", "expected"), [(torch.float32, torch.bfloat16), (torch.float16, torch.bfloat16), (torch.float64, None)]
)
def test_products_under_autocast_are_those_of_a_layer(dtype: torch.dtype, expected: torch.dtype | None) -> None:
    x = torch.ones(2, 3, dtype=dtype)
    assert product_dtype(x) == dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert product_dtype(x) == torch.nn.functional.linear(x, x).dtype == (expected or dtype)
