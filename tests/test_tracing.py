"""Tracers find one program for all batch sizes; torch.func and forward-mode AD find the right derivative."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.export import Dim
from torch.utils._pytree import tree_map

from simmp_fast import ops, portable

BANK = {"memory": torch.rand(3, 7, 16), "prototypes": torch.rand(3, 16)}
# Tokens an image: past the chunk of the context attention, and past that of the split attention.
LONG, LONGER = 400, 1100


def _tokens(batch: int, length: int, *names: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(batch)
    return {name: torch.randn(batch, length, 16, generator=generator) for name in names}


def _split(batch: int, length: int) -> dict[str, Tensor]:
    tokens = _tokens(batch, length, "query", "key", "value")
    return {**tokens, "row_mean": tokens["query"].mean(-1), "threshold": tokens["key"].std(-1)}


def _cluster(batch: int) -> Tensor:
    return torch.arange(batch * 49).view(batch, 49) % 3


# Arguments of an operator by the size of the batch: those that grow with it, and the others.
Arguments = Callable[[int], tuple[dict[str, Any], dict[str, Any]]]
CASES: dict[tuple[str, str], Arguments] = {
    ("assign_clusters", "49"): lambda b: (_tokens(b, 49, "query"), {"prototypes": BANK["prototypes"]}),
    ("context_attention", "49"): lambda b: (_tokens(b, 49, "query", "key", "value"), {}),
    ("context_attention", "long"): lambda b: (_tokens(b, LONG, "query", "key", "value"), {}),
    ("memory_attention", "49"): lambda b: (_tokens(b, 49, "query"), BANK),
    ("memory_attention", "given"): lambda b: ({**_tokens(b, 49, "query"), "cluster": _cluster(b)}, BANK),
    ("memory_context_attention", "49"): lambda b: (_tokens(b, 49, "query", "key", "value"), BANK),
    ("update_memory", "49"): lambda b: (_tokens(b, 49, "tokens"), {**BANK, "k": 3}),
    ("update_memory", "given"): lambda b: (
        {**_tokens(b, 49, "tokens"), "cluster": _cluster(b)},
        {**BANK, "k": torch.tensor(3)},
    ),
    ("window_similarity", "8x8"): lambda b: ({"x": torch.randn(b, 5, 8, 8)}, {"window": 4}),
    ("decay_weights", "4"): lambda b: (
        {"score": torch.randn(b, 4)},
        {"grid": (8, 8), "window": 4, "gamma": 0.5, "variant": "paper", "dtype": torch.float32},
    ),
    ("split_threshold", "49"): lambda b: (_tokens(b, 49, "query", "key"), {}),
    ("split_attention", "49"): lambda b: (_split(b, 49), {}),
    ("split_attention", "long"): lambda b: (_split(b, LONGER), {}),
    ("powerset_loss", "16x16"): lambda b: (
        {"heads": [torch.randn(b, 3, s, s) for s in (4, 16)], "label": torch.arange(b * 256).view(b, 16, 16) % 3},
        {},
    ),
}


@pytest.mark.parametrize(("operator", "case"), CASES)
def test_two_graphs_at_most_serve_all_batch_sizes(operator: str, case: str) -> None:
    torch._dynamo.reset()
    arguments, function = CASES[operator, case], getattr(ops, operator)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    for batch in (2, 3, 8) if case == "long" else range(2, 9):
        growing, fixed = arguments(batch)
        torch.testing.assert_close(compiled(**growing, **fixed), function(**growing, **fixed))
    assert counter.frame_count <= 2


@pytest.mark.parametrize(("operator", "case"), CASES)
def test_a_strict_export_leaves_the_batch_open(operator: str, case: str) -> None:
    arguments = CASES[operator, case]
    _, fixed = arguments(2)

    class Call(torch.nn.Module):
        def forward(self, growing: dict[str, Any]) -> Any:
            return getattr(ops, operator)(**growing, **fixed)

    growing = arguments(4)[0]
    batch = Dim("batch", min=2, max=64)
    shapes = tree_map(lambda _: {0: batch}, growing)
    with torch.no_grad():
        program = torch.export.export(Call(), (growing,), dynamic_shapes=(shapes,), strict=True)
        other = arguments(7)[0]
        torch.testing.assert_close(program.module()(other), Call()(other))


# --- torch.func and forward-mode AD -----------------------------------------------------------------------------------

LABEL = torch.arange(2 * 64).view(2, 8, 8) % 3


def _context(module: ModuleType, x: Tensor) -> Tensor:
    return module.context_attention(x, x.flip(1), x * 2).square().sum()


def _memory_context(module: ModuleType, x: Tensor) -> Tensor:
    return module.memory_context_attention(x, x.flip(1), x * 2, *(b.double() for b in BANK.values()))[0].square().sum()


def _split_attention(module: ModuleType, x: Tensor) -> Tensor:
    return module.split_attention(x, x.flip(1), x * 2, x.mean(-1), x.std(-1)).square().sum()


def _loss(module: ModuleType, x: Tensor) -> Tensor:
    return module.powerset_loss([x, x[..., ::2, ::2]], LABEL)


FUNCTIONS = {
    "context": (_context, (2, LONG, 4)),
    "memory_context": (_memory_context, (2, LONG, 16)),
    "split": (_split_attention, (1, LONGER, 4)),
    "loss": (_loss, (2, 3, 8, 8)),
}
WORKS = [
    pytest.param(module, *FUNCTIONS[name], id=f"{module.__name__.split('.')[-1]}-{name}")
    for module in (portable, ops)
    for name in FUNCTIONS
    if (module, name) != (portable, "loss")
]


@pytest.mark.parametrize(("module", "function", "shape"), WORKS)
def test_transforms_give_what_autograd_gives(
    module: ModuleType, function: Callable[[ModuleType, Tensor], Tensor], shape: tuple[int, ...]
) -> None:
    call = functools.partial(function, module)
    x, along = torch.randn(2, *shape, dtype=torch.float64).unbind()
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(call(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(call)(x), gradient)
    torch.testing.assert_close(torch.func.vmap(call)(torch.stack([x, along])), torch.stack([call(x), call(along)]))
    slope = (gradient * along).sum()
    torch.testing.assert_close(torch.func.jvp(call, (x,), (along,))[1], slope)
    with forward_ad.dual_level():
        dual = call(forward_ad.make_dual(x, along))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, slope)


@pytest.mark.parametrize(("transform", "images"), [(torch.func.grad, (2,)), (torch.func.vmap, (2, 2))])
def test_a_loss_that_they_cannot_look_into_says_so(transform: Callable[..., Any], images: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="powerset_loss: got a call under torch.func.*expected backend 'auto'"):
        transform(functools.partial(_loss, portable))(torch.randn(*images, 3, 8, 8))


def test_the_kernels_refuse_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "why_not_triton", lambda device, dtype: None)
    x = torch.randn(2, 5, 4)
    with pytest.raises(ops.BackendError, match="'triton' cannot run here: torch.func and forward-mode AD"):
        torch.func.grad(lambda y: ops.context_attention(y, y, y, backend="triton").sum())(x)
    assert torch.func.grad(lambda y: ops.context_attention(y, y, y).sum())(x).isfinite().all()  # auto: portable
