"""Registration, fake tensors, compilation, autocast, operation counts and errors of the DMW-LA kernels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from simmp_fast import kernels, reference
from simmp_fast.kernels.configs import forced, pick

OPS = torch.ops.simmp_fast


def inputs(grad: bool = True, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    torch.manual_seed(0)
    made = {name: torch.randn(2, 21, 16, dtype=dtype) * 0.5 for name in ("query", "key", "value")}
    return {n: x.requires_grad_(grad) for n, x in made.items()} | {
        "memory": torch.rand(3, 7, 16),
        "prototypes": torch.randn(3, 16),
    }


@pytest.mark.parametrize("save", [True, False])
def test_opcheck_attention(save: bool) -> None:
    x = inputs(save)
    q, k, v, memory, prototypes = x.values()
    cluster = reference.assign_clusters(q, prototypes)
    torch.library.opcheck(OPS.context_attention.default, (q, k, v, save))
    for given in (None, cluster):
        torch.library.opcheck(OPS.memory_attention.default, (q, memory, prototypes, given, save))
        torch.library.opcheck(OPS.memory_context_attention.default, (q, k, v, memory, prototypes, given, save))


def test_opcheck_rest() -> None:
    x = inputs(False)
    q, k, v, memory, prototypes = x.values()
    torch.library.opcheck(OPS.assign_clusters.default, (q, prototypes, "cosine"))
    torch.library.opcheck(OPS.update_memory.default, (q, memory, prototypes, torch.tensor(3), 0, 0.3, None))
    cluster = reference.assign_clusters(q, prototypes)
    found = OPS.memory_context_attention(q, k, v, memory, prototypes, cluster, True)
    torch.library.opcheck(OPS.attention_backward.default, (q, q, k, v, memory, cluster, *found[2:]))


def test_fake_tensors() -> None:
    with FakeTensorMode():
        q = torch.empty(2, 21, 16, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        memory, prototypes = torch.empty(3, 7, 16, device="cuda"), torch.empty(3, 16, device="cuda")
        out, cluster = kernels.memory_context_attention(q, q, q, memory, prototypes)
        assert (out.shape, out.dtype, out.device.type) == (q.shape, torch.bfloat16, "cuda")
        assert (cluster.shape, cluster.dtype) == (q.shape[:2], torch.int64)
        new, anchors = kernels.update_memory(q, memory, prototypes, 3)
        assert new.shape == memory.shape
        assert anchors.dtype == torch.float32


def block(query: Tensor, key: Tensor, value: Tensor, memory: Tensor, prototypes: Tensor, operators: Any) -> Tensor:
    out, cluster = operators.memory_context_attention(query, key, value, memory, prototypes)
    bank, anchors = operators.update_memory(key, memory, prototypes, 2)
    apart = operators.context_attention(query, key, value)
    return out.sum() + (apart * operators.memory_attention(query, bank, anchors, cluster)[0]).sum()


def test_compile_fullgraph() -> None:
    results = []
    for function in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
        x = inputs()
        loss = function(*x.values(), kernels)
        results.append((loss, *torch.autograd.grad(loss, [x["query"], x["key"], x["value"]])))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=0, atol=0)


@pytest.mark.parametrize("given", [False, True])
def test_autocast(given: bool) -> None:
    x = inputs()
    cluster = reference.assign_clusters(x["query"], x["prototypes"])
    with torch.autocast("cpu", torch.float16):
        out, found = kernels.memory_context_attention(**x, cluster=cluster if given else None)
        own, _ = reference.memory_context_attention(**x, cluster=cluster)
        apart = kernels.context_attention(x["query"], x["key"], x["value"])
        recalled, _ = kernels.memory_attention(x["query"], x["memory"], x["prototypes"])
    assert out.dtype == own.dtype == apart.dtype == recalled.dtype == torch.float16
    assert torch.equal(found, cluster)  # matched in float32, before the cast
    torch.testing.assert_close(out, own, rtol=4e-3, atol=4e-3)
    gradients = torch.autograd.grad(out.float().sum(), [x["query"], x["key"], x["value"]])
    assert all(g.dtype == torch.float32 for g in gradients)


def test_flops() -> None:
    x = inputs()
    with FlopCounterMode(display=False) as counter:
        kernels.memory_context_attention(**x)[0].sum().backward()
    images, tokens, dim, clusters, slots = 2, 21, 16, 3, 7
    forward = 2 * images * tokens * dim * (2 * tokens + 2 * slots + clusters)
    backward = 2 * images * tokens * dim * (5 * tokens + 3 * slots)
    assert counter.get_total_flops() == forward + backward


def test_large_values_do_not_leak_from_padding() -> None:
    """Rows beyond the image lie between the images of a slice: they hold NaN here and must never be read as numbers."""
    x = inputs(False)
    wide = {n: torch.full((2, 29, 16), float("nan")) for n in ("query", "key", "value")}
    for name, tensor in wide.items():
        tensor[:, :21] = x[name]
    part = {n: t[:, :21].requires_grad_() for n, t in wide.items()}
    out, _ = kernels.memory_context_attention(**part, memory=x["memory"], prototypes=x["prototypes"])
    same, _ = kernels.memory_context_attention(**x)
    assert torch.equal(out, same)
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(out.sum(), list(part.values())))


def test_bfloat16_is_refused_under_the_interpreter() -> None:
    x = {n: t.bfloat16() for n, t in inputs(False).items()}
    with pytest.raises(TypeError, match="query: got dtype torch.bfloat16 under TRITON_INTERPRET=1"):
        kernels.memory_context_attention(**x)
    with pytest.raises(TypeError, match="tokens: got dtype torch.bfloat16"):
        kernels.update_memory(x["query"], x["memory"], x["prototypes"], 2)


def test_errors_name_the_argument() -> None:
    x = inputs(False)
    with pytest.raises(TypeError, match="query: got dtype torch.float64"):
        kernels.context_attention(*(x[n].double() for n in ("query", "key", "value")))
    with pytest.raises(ValueError, match="k: got 8, expected 1 to 7"):
        kernels.update_memory(x["query"], x["memory"], x["prototypes"], 8)
    with pytest.raises(ValueError, match="query: got 300 channels, expected at most 256"):
        kernels.context_attention(*(torch.zeros(1, 2, 300) for _ in range(3)))


def test_update_is_four_launches(launched: list[str]) -> None:
    x = inputs(False)
    kernels.update_memory(x["query"], x["memory"], x["prototypes"], torch.tensor(3))
    assert len(launched) == 4


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("tokens", [60, 9], ids=["enough tokens", "repeated tokens"])
def test_a_token_that_is_no_number_reads_nothing_unwritten(
    bad: float, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The update of a step that is then masked: whatever lay in the scratch memory, the same slots come out."""
    torch.manual_seed(0)
    x = torch.randn(1, tokens, 16)
    x[0, 3, 5] = bad
    memory, prototypes = torch.rand(2, 8, 16), torch.randn(2, 16)
    cluster = (torch.arange(tokens) % 2).unsqueeze(0)
    plain, found = torch.empty, []
    for content in (0, 1):
        monkeypatch.setattr(torch, "empty", lambda *a, fill=content, **k: plain(*a, **k).fill_(fill))
        found.append(kernels.update_memory(x, memory, prototypes, 6, cluster=cluster)[0])
    monkeypatch.setattr(torch, "empty", plain)
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0, equal_nan=True)
    expected = reference.update_memory(x, memory, prototypes, 6, cluster=cluster)[0]
    torch.testing.assert_close(found[0][0], expected[0])  # the cluster without that token
    assert not torch.isfinite(found[0][1]).all()


@pytest.mark.parametrize("metric", ["cosine", "dot"])
def test_a_query_that_is_no_number_has_a_cluster_that_there_is(metric: str) -> None:
    query = torch.full((1, 21, 16), float("nan"))
    query[0, ::2] = 1.0
    found = kernels.assign_clusters(query, torch.randn(3, 16), metric=metric)
    assert int(found.min()) >= 0
    assert int(found.max()) < 3


@pytest.mark.parametrize("tile", [32, 128])
def test_any_tile_of_the_assignment_gives_the_same_update(tile: int) -> None:
    """`update_score` goes by the tiles of `update_assign`; what `tune` tries must not lead past its counts."""
    torch.manual_seed(0)
    x, memory = torch.randn(2, 200, 16), torch.rand(3, 7, 16)
    prototypes = torch.randn(3, 16)
    usual = kernels.update_memory(x, memory, prototypes, 4)
    config = pick("update_assign", "float32", 16, x.device)
    with forced(replace(config, tiles={**config.tiles, "BLOCK_T": tile})):
        other = kernels.update_memory(x, memory, prototypes, 4)
    for mine, expected in zip(other, usual, strict=True):
        torch.testing.assert_close(mine, expected)
