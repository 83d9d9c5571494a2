"""The reference operators on their own: gradients, edge shapes, and sentences of the contract."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from simmp_fast import reference

DOUBLE = torch.float64


def draw(*shape: int, seed: int = 0, grad: bool = False, dtype: torch.dtype = DOUBLE) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_(grad)


def test_context_attention_gradcheck() -> None:
    inputs = [draw(2, 5, 3, seed=s, grad=True) for s in range(3)]
    assert torch.autograd.gradcheck(reference.context_attention, inputs)


def test_memory_context_attention_gradcheck() -> None:
    query, key, value = (draw(2, 5, 3, seed=s, grad=True) for s in range(3))
    memory, prototypes = draw(4, 6, 3, seed=3), draw(4, 3, seed=4)
    cluster = reference.assign_clusters(query, prototypes)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return reference.memory_context_attention(q, k, v, memory, prototypes, cluster)[0]

    assert torch.autograd.gradcheck(attend, (query, key, value))


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_split_attention_gradcheck(variant: str) -> None:
    query, key, value = (draw(2, 6, 3, seed=s, grad=True) for s in range(3))
    row_mean, threshold = reference.split_threshold(query, key)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return reference.split_attention(q, k, v, row_mean, threshold, variant=variant)

    assert torch.autograd.gradcheck(attend, (query, key, value))


def test_powerset_loss_gradcheck_with_heads_at_their_own_resolution() -> None:
    heads = [draw(2, 3, s, s, seed=s, grad=True) for s in (1, 2, 4)]
    label = torch.randint(3, (2, 4, 4), generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(lambda *h: reference.powerset_loss(list(h), label), heads)


def test_low_resolution_heads_equal_resized_heads() -> None:
    heads = [draw(2, 3, s, s, seed=s) for s in (4, 8)]
    label = torch.randint(3, (2, 16, 16), generator=torch.Generator().manual_seed(0))
    resized = [F.interpolate(h, (16, 16), mode="bilinear", align_corners=False) for h in heads]
    torch.testing.assert_close(reference.powerset_loss(heads, label), reference.powerset_loss(resized, label))


def test_memory_gets_no_gradient() -> None:
    query, memory = draw(1, 4, 3, grad=True), draw(2, 5, 3, seed=1, grad=True)
    prototypes = draw(2, 3, seed=2, grad=True)
    output, cluster = reference.memory_attention(query, memory, prototypes)
    output.sum().backward()
    assert query.grad is not None
    assert memory.grad is None
    assert prototypes.grad is None
    assert not cluster.requires_grad


def test_ties_go_to_the_lower_index() -> None:
    same = torch.ones(1, 3, 4, dtype=DOUBLE)
    assert reference.assign_clusters(same, torch.ones(5, 4, dtype=DOUBLE)).eq(0).all()
    memory = torch.zeros(1, 4, 2, dtype=DOUBLE)
    tokens = torch.tensor([[[1.0, 1.0], [1.0, 1.0], [2.0, 2.0]]], dtype=DOUBLE)
    written, _ = reference.update_memory(tokens, memory, torch.ones(1, 2, dtype=DOUBLE), 2, rate=1.0)
    assert torch.equal(written[0], torch.tensor([[2.0, 2.0], [1.0, 1.0], [0, 0], [0, 0]], dtype=DOUBLE))


def test_device_k_is_clamped_and_an_int_is_checked() -> None:
    tokens, memory, prototypes = draw(1, 9, 3), draw(2, 4, 3, seed=1), draw(2, 3, seed=2)
    for given, meant in ((0, 1), (-3, 1), (99, 4)):
        got = reference.update_memory(tokens, memory, prototypes, torch.tensor(given))
        torch.testing.assert_close(got, reference.update_memory(tokens, memory, prototypes, meant), rtol=0, atol=0)
    for bad in (0, 5):
        with pytest.raises(ValueError, match=r"^k: got"):
            reference.update_memory(tokens, memory, prototypes, bad)


def test_inputs_are_left_alone() -> None:
    tokens, memory, prototypes = draw(1, 9, 3), draw(2, 4, 3, seed=1), draw(2, 3, seed=2)
    copies = [t.clone() for t in (tokens, memory, prototypes)]
    reference.update_memory(tokens, memory, prototypes, 2)
    for tensor, copy in zip((tokens, memory, prototypes), copies, strict=True):
        assert torch.equal(tensor, copy)


def test_half_tokens_meet_a_float32_bank() -> None:
    query = draw(2, 7, 8).bfloat16()
    memory, prototypes = draw(3, 5, 8, seed=1, dtype=torch.float32), draw(3, 8, seed=2, dtype=torch.float32)
    output, _ = reference.memory_context_attention(query, query, query, memory, prototypes)
    assert output.dtype == torch.bfloat16
    new_memory, new_prototypes = reference.update_memory(query, memory, prototypes, 2)
    assert new_memory.dtype == new_prototypes.dtype == torch.float32
    for statistic in reference.split_threshold(query, query):
        assert statistic.dtype == torch.float32


def test_empty_batch() -> None:
    empty = torch.zeros(0, 4, 3, dtype=DOUBLE, requires_grad=True)
    memory, prototypes = draw(2, 5, 3), draw(2, 3, seed=1)
    output, cluster = reference.memory_context_attention(empty, empty, empty, memory, prototypes)
    assert output.shape == (0, 4, 3)
    assert cluster.shape == (0, 4)
    new_memory, new_prototypes = reference.update_memory(empty, memory, prototypes, 2)
    assert torch.equal(new_memory, memory)
    torch.testing.assert_close(new_prototypes, memory.mean(1))
    assert reference.window_similarity(torch.zeros(0, 3, 4, 4), 2).shape == (0, 4)
    row_mean, threshold = reference.split_threshold(empty, empty)
    assert reference.split_attention(empty, empty, empty, row_mean, threshold).shape == (0, 4, 3)
    head = torch.zeros(0, 3, 4, 4, requires_grad=True)
    loss = reference.powerset_loss([head], torch.zeros(0, 4, 4, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0
    assert head.grad is not None


@pytest.mark.parametrize("length", [1, 2])
@pytest.mark.parametrize("variant", ["paper", "released"])
def test_an_empty_near_set_weighs_all_tokens_alike(length: int, variant: str) -> None:
    value = draw(1, length, 3)
    same = torch.full((1, length, 3), 0.1, dtype=DOUBLE)
    row_mean, threshold = reference.split_threshold(same, same)
    output = reference.split_attention(same, same, value, row_mean, threshold, variant=variant)
    torch.testing.assert_close(output, 2 * value.mean(1, keepdim=True).expand_as(value))


def test_extreme_logits_stay_finite() -> None:
    head = (draw(1, 3, 4, 4) * 1e4).float().requires_grad_()
    label = torch.zeros(1, 4, 4, dtype=torch.int64)
    loss = reference.powerset_loss([head, head * 2], label)
    (gradient,) = torch.autograd.grad(loss, head)
    assert loss.isfinite()
    assert gradient.isfinite().all()


def test_zero_vectors_are_defined() -> None:
    zero = torch.zeros(1, 4, 3, dtype=DOUBLE)
    assert reference.assign_clusters(zero, torch.zeros(2, 3, dtype=DOUBLE)).eq(0).all()
    assert reference.window_similarity(torch.zeros(1, 3, 4, 4), 2).eq(0).all()


def test_split_threshold_ignores_autocast() -> None:
    query, key = draw(1, 9, 4, dtype=torch.float32), draw(1, 9, 4, seed=1, dtype=torch.float32)
    plain = reference.split_threshold(query, key)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = reference.split_threshold(query, key)
    for a, b in zip(plain, under, strict=True):
        assert torch.equal(a, b)
