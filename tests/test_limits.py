"""The kernels' limits: `auto` takes Triton up to each, portable past it; and each is what the kernels really refuse."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from simmp_fast import limits, ops
from simmp_fast.ops import BackendError

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def made(*shape: int) -> Tensor:
    """A tensor of any shape in the memory of one number."""
    return torch.zeros(()).expand(shape)


def tokens(images: int = 1, length: int = 2, dim: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    return (made(images, length, dim),) * 3


def bank(clusters: int = 3, slots: int = 4, dim: int = 8) -> tuple[Tensor, Tensor]:
    return made(clusters, slots, dim), made(clusters, dim)


def labels(height: int, width: int) -> Tensor:
    return torch.zeros((), dtype=torch.int64).expand(1, height, width)


def split_row(images: int, channels: int) -> tuple[Tensor, ...]:
    return *tokens(images, 2, channels), made(images, 2), made(images, 2)


# By name: the operator, the limit, and its arguments at a size. Sizes that are products are walked along one factor.
WALKS: dict[str, tuple[str, int, Callable[[int], tuple[Any, ...]]]] = {
    "channels of the matching": (
        "assign_clusters", limits.HEAD_DIM, lambda n: (tokens(dim=n)[0], bank(dim=n)[1])
    ),
    "channels of the context": ("context_attention", limits.HEAD_DIM, lambda n: tokens(dim=n)),
    "channels of the memory": (
        "memory_attention", limits.HEAD_DIM, lambda n: (tokens(dim=n)[0], *bank(dim=n))
    ),
    "channels of both": (
        "memory_context_attention", limits.HEAD_DIM, lambda n: (*tokens(dim=n), *bank(dim=n))
    ),
    "channels of the update": (
        "update_memory", limits.HEAD_DIM, lambda n: (tokens(dim=n)[0], *bank(dim=n), 1)
    ),
    "channels of a map": ("window_similarity", limits.CHANNELS, lambda n: (made(1, n, 2, 2), 2)),
    "channels of the threshold": ("split_threshold", limits.CHANNELS, lambda n: tokens(dim=n)[:2]),
    "channels of the split": ("split_attention", limits.CHANNELS, lambda n: split_row(1, n)),
    "clusters of the matching": ("assign_clusters", limits.CLUSTERS, lambda n: (tokens()[0], bank(n)[1])),
    "clusters of the memory": ("memory_attention", limits.CLUSTERS, lambda n: (tokens()[0], *bank(n))),
    "clusters of both": ("memory_context_attention", limits.CLUSTERS, lambda n: (*tokens(), *bank(n))),
    "clusters of the update": ("update_memory", limits.CLUSTERS, lambda n: (tokens()[0], *bank(n), 1)),
    "slots of the update": ("update_memory", limits.SLOTS, lambda n: (tokens()[0], *bank(slots=n), 1)),
    "slots of the memory": (
        "memory_attention", limits.CLUSTER_SIZE, lambda n: (tokens(dim=1)[0], *bank(slots=n, dim=1))
    ),
    "slots of both": (
        "memory_context_attention", limits.CLUSTER_SIZE, lambda n: (*tokens(dim=1), *bank(slots=n, dim=1))
    ),
    "tokens of the matching": (
        "assign_clusters", limits.TOKENS, lambda n: (tokens(n, 1)[0], bank()[1])
    ),
    "tokens of the context": ("context_attention", limits.TOKENS, lambda n: tokens(1, n)),
    "tokens of the memory": ("memory_attention", limits.TOKENS, lambda n: (tokens(n, 1)[0], *bank())),
    "tokens of both": ("memory_context_attention", limits.TOKENS, lambda n: (*tokens(n, 1), *bank())),
    "tokens of the update": ("update_memory", limits.TOKENS, lambda n: (tokens(n, 1)[0], *bank(), 1)),
    "tokens of a map": ("window_similarity", limits.TOKENS, lambda n: (made(n, 3, 1, 1), 1)),
    "tokens of the weights": (
        "decay_weights", limits.TOKENS, lambda n: (made(n, 1), (1, 1), 1, 0.8, "paper", torch.float32)
    ),
    "tokens of the threshold": ("split_threshold", limits.TOKENS, lambda n: tokens(1, n)[:2]),
    "tokens of the split": (
        "split_attention", limits.TOKENS, lambda n: (*tokens(n, 1), made(n, 1), made(n, 1))
    ),
    "side of a window": ("window_similarity", limits.WINDOW, lambda n: (made(1, 3, n, n), n)),
    "classes of the loss": ("powerset_loss", limits.CLASSES, lambda n: ([made(1, n, 2, 2)], labels(4, 4))),
    "rows of the label": ("powerset_loss", limits.LABEL_SIDE, lambda n: ([made(1, 2, 2, 2)], labels(n, 4))),
    "columns of the label": ("powerset_loss", limits.LABEL_SIDE, lambda n: ([made(1, 2, 2, 2)], labels(4, n))),
    "planes of the loss": (
        "powerset_loss", limits.TOKENS, lambda n: ([made(n, 1, 1, 1)], labels(1, 1).expand(n, 1, 1))
    ),
}  # fmt: skip


class Taken:
    """Stands for an implementation: its operators return its name."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __getattr__(self, _: str) -> Callable[..., str]:
        return lambda *_, **__: self.name


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors count as a GPU's, and the door says where it leads."""
    monkeypatch.setattr(ops, "why_not_triton", lambda *_: None)
    monkeypatch.setattr(ops, "_rather_portable", lambda *_: None)  # limits, not preferences
    monkeypatch.setattr(ops, "_module", Taken)


@pytest.mark.parametrize("walk", WALKS)
def test_auto_takes_portable_past_a_limit(walk: str, on_gpu: None) -> None:
    name, most, arguments = WALKS[walk]
    call = getattr(ops, name)
    assert call(*arguments(most)) == "triton"
    assert call(*arguments(most), backend="triton") == "triton"
    assert call(*arguments(most + 1)) == "portable"
    with pytest.raises(BackendError, match=r"'triton' cannot run here: .*: got \d+ .*, expected at most \d+"):
        call(*arguments(most + 1), backend="triton")


class Launched(Exception):  # noqa: N818  (no error: the kernel took the tensors)
    """The operator behind a kernel's checks was reached."""


@pytest.mark.parametrize("walk", WALKS)
def test_the_kernels_refuse_what_the_door_refuses(walk: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from simmp_fast import kernels

    def reached(*_: object) -> None:
        raise Launched

    name, most, arguments = WALKS[walk]
    call = getattr(kernels, name)
    monkeypatch.setattr(torch.ops.simmp_fast, name, reached)
    with pytest.raises(Launched):
        call(*arguments(most))
    with pytest.raises(ValueError, match=r"expected at most \d+ \(Triton kernels\)"):
        call(*arguments(most + 1))


def test_every_limit_is_walked() -> None:
    known = {value for name, value in vars(limits).items() if name.isupper() and isinstance(value, int)}
    assert known == {most for _, most, _ in WALKS.values()}
    assert {name for name, _, _ in WALKS.values()} == set(limits.LAUNCHES)


@pytest.mark.parametrize("name", ["memory_attention", "memory_context_attention", "update_memory", "assign_clusters"])
def test_a_float64_bank_goes_to_portable(name: str, on_gpu: None) -> None:
    memory, prototypes = (x.double() for x in bank())
    query = tokens()[0]
    arguments = {
        "memory_attention": (query, memory, prototypes),
        "memory_context_attention": (query, query, query, memory, prototypes),
        "update_memory": (query, memory, prototypes, 1),
        "assign_clusters": (query, prototypes),
    }[name]
    assert getattr(ops, name)(*arguments) == "portable"
    with pytest.raises(BackendError, match="got dtype torch.float64"):
        getattr(ops, name)(*arguments, backend="triton")
    from simmp_fast import kernels

    with pytest.raises((TypeError, ValueError), match="got dtype torch.float64|expected a CUDA device"):
        getattr(kernels, name)(*arguments)


def test_the_table_ends_where_the_limits_do() -> None:
    """Rows are as wide as the limits say, in every dtype class and on every target, and no wider."""
    import simmp_fast.kernels  # noqa: F401  (fills the table)
    from simmp_fast.kernels.configs import SHARED_LIMITS, TARGETS, lookup, rows

    most = {"powerset_loss_sums": 6 * limits.CLASSES, "powerset_loss_pixels": 6 * limits.CLASSES}
    for operator, name, size in (
        *((operator, "dim", limits.HEAD_DIM) for operator in limits.LAUNCHES),
        ("update_memory", "slots", limits.SLOTS),
    ):
        most |= dict.fromkeys(limits.LAUNCHES[operator].get(name, ()), size)
    for kernel, width in most.items():
        for kind in {"half", "float32", "tf32"}:
            for capability in TARGETS:
                lookup(kernel, kind, width, capability, SHARED_LIMITS[capability])
            with pytest.raises(ValueError, match=f"got a width of {width + 1}"):
                lookup(kernel, kind, width + 1, (9, 0), SHARED_LIMITS[9, 0])
    named = {kernel for kernels in limits.LAUNCHES.values() for names in kernels.values() for kernel in names}
    assert named == {row.kernel for row in rows()}


def test_what_is_compiled_ahead_of_time_holds_as_many_clusters() -> None:
    from simmp_fast.kernels.aot import plan, signature

    held = {signature(case).constants.get("BLOCK_K") for case in plan() if "split" not in case.kernel}
    assert limits.CLUSTERS in held
    assert max(size for size in held if size is not None) == limits.CLUSTERS


def test_arguments_that_nobody_takes_are_left_to_validation(on_gpu: None) -> None:
    odd = made(2)
    assert ops.memory_attention(odd, "no tensor", odd) == "triton"
    assert ops.window_similarity(odd, 3) == "triton"
    assert ops.powerset_loss([odd], odd) == "triton"
