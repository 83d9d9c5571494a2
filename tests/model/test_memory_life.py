"""The memory's life: warm-up, structuring, update, and what must never happen to it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from simmp_fast.model import DMWLABlock, MemoryBank
from simmp_fast.model.structuring import structure

CHANNELS, DIM, CLUSTERS, SLOTS = 6, 5, 3, 8


def make_block(seed: int = 0, warmup_steps: int = 20) -> DMWLABlock:
    torch.manual_seed(seed)
    bank = MemoryBank(CLUSTERS, SLOTS, DIM, warmup_steps=warmup_steps, seed=7, name="block", backend="reference")
    return DMWLABlock(CHANNELS, DIM, bank, backend="reference")


def image(step: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, CHANNELS, 4, 5, generator=torch.Generator().manual_seed(1000 + step))


def train(block: DMWLABlock, first: int, last: int, k: int = 3) -> None:
    """Plain gradient steps, so that the projections move and the bank follows them."""
    for step in range(first, last):
        block(image(step)).square().mean().backward()
        block.commit_memory(k)
        with torch.no_grad():
            for parameter in block.parameters():
                parameter -= 0.05 * parameter.grad
                parameter.grad = None


def snapshot(block: DMWLABlock) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in block.state_dict().items()}


def test_warmup_fills_the_bank_more_and_more() -> None:
    block = make_block()
    written = []
    for step in range(20):
        before = block.bank.memory.clone()
        train(block, step, step + 1)
        if step < 19:
            written.append(int((block.bank.memory != before).any(-1).sum()))
    drawn = 2 * (CLUSTERS * SLOTS // 2)
    assert written == [max(1, int(0.5 * (t + 1) / 20 * drawn)) for t in range(19)]


def test_warmup_writes_keys_of_the_image() -> None:
    block = make_block()
    before = block.bank.memory.clone()
    x = image(0)
    keys = block.key(x.flatten(2).transpose(1, 2)).detach().reshape(-1, DIM)
    block(x).sum().backward()
    block.commit_memory(3)
    new = block.bank.memory[(block.bank.memory != before).any(-1)]
    assert len(new) == 1
    assert torch.isclose(keys, new).all(-1).any(), "the slot written is a token's key"


def test_structuring_happens_once_and_at_the_right_step(monkeypatch: pytest.MonkeyPatch) -> None:
    from simmp_fast.model import memory as module

    calls: list[int] = []
    block = make_block(warmup_steps=5)

    def counted(bank: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        calls.append(block.bank.step)
        assert not block.bank.warming
        return structure(bank, generator)

    monkeypatch.setattr(module, "structure", counted)
    for step in range(12):
        assert block.bank.warming == (step < 5)
        train(block, step, step + 1)
    assert calls == [5]


def test_structuring_lays_out_whole_clusters() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[10.0, 0.0], [0.0, 10.0], [-10.0, -10.0]])
    owner = torch.tensor([0] * 9 + [1] * 2 + [2] * 4)
    points = centres[owner] + 0.1 * torch.randn(15, 2, generator=generator)
    memory, prototypes = structure(points.view(3, 5, 2), torch.Generator().manual_seed(0))
    for slots, prototype in zip(memory, prototypes, strict=True):
        assert torch.allclose(prototype.norm(), torch.tensor(1.0))
        centre = int((centres / centres.norm(dim=-1, keepdim=True) @ prototype).argmax())
        members = points[owner == centre]
        if len(members) >= 5:
            assert torch.equal(slots, members[:5]), "the first members, in slot order"
        else:
            assert torch.equal(slots[: len(members)], members)
            assert all((members == slot).all(-1).any() for slot in slots), "filled by repeating members"


def test_structuring_fills_an_empty_cluster_with_its_centroid() -> None:
    memory, prototypes = structure(torch.ones(3, 4, 2), torch.Generator())
    assert memory.eq(1).all()
    assert torch.allclose(prototypes, torch.full((3, 2), 0.5**0.5))


def test_structuring_refuses_what_is_not_finite() -> None:
    with pytest.raises(ValueError, match="memory: got a value that is not finite"):
        structure(torch.full((2, 3, 2), float("nan")), torch.Generator())


def test_prototypes_follow_the_slots() -> None:
    block = make_block(warmup_steps=3)
    train(block, 0, 3)
    for step in range(3, 200):
        train(block, step, step + 1)
        torch.testing.assert_close(block.bank.prototypes, block.bank.memory.mean(1))
    assert block.bank.memory.isfinite().all()


def test_the_momentum_key_rests_in_warmup_and_follows_afterwards() -> None:
    block = make_block(warmup_steps=3)
    first = block.momentum_key.clone()
    train(block, 0, 3)
    assert torch.equal(block.momentum_key, first)
    before, key = block.momentum_key.clone(), block.key.weight.detach().clone()
    train(block, 3, 4)
    torch.testing.assert_close(block.momentum_key, 0.95 * before + 0.05 * key)


def test_two_equal_runs_are_bitwise_equal() -> None:
    states = []
    for _ in range(2):
        block = make_block()
        train(block, 0, 300)
        states.append(snapshot(block))
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("stop", [7, 20, 33], ids=["warmup", "structuring", "structured"])
def test_saving_and_loading_in_the_middle_changes_nothing(stop: int) -> None:
    straight = make_block()
    train(straight, 0, 60)
    first = make_block()
    train(first, 0, stop)
    second = make_block(seed=99)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train(second, stop, 60)
    expected, got = snapshot(straight), snapshot(second)
    assert all(torch.equal(expected[name], got[name]) for name in expected)


@pytest.mark.parametrize("steps", [2, 25], ids=["warmup", "structured"])
def test_evaluation_changes_nothing(steps: int) -> None:
    block = make_block()
    train(block, 0, steps)
    before = snapshot(block)
    block.eval()
    block(image(0)).sum().backward()
    block.train()
    with torch.no_grad():
        block(image(1))
    after = snapshot(block)
    assert all(torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(RuntimeError, match="nothing to commit"):
        block.commit_memory(3)


def test_nothing_is_written_before_commit_and_addresses_stay() -> None:
    block = make_block(warmup_steps=2)
    train(block, 0, 4)
    before, address = block.bank.memory.clone(), block.bank.memory.data_ptr()
    loss = block(image(9)).square().mean()
    assert torch.equal(block.bank.memory, before)
    loss.backward()
    assert torch.equal(block.bank.memory, before)
    block.commit_memory(3)
    assert not torch.equal(block.bank.memory, before)
    assert block.bank.memory.data_ptr() == address


def test_recomputation_writes_nothing_more() -> None:
    plain, recomputed = make_block(warmup_steps=2), make_block(warmup_steps=2)
    for reentrant in (False, True):
        for step in range(4):
            x = image(step).requires_grad_()
            plain(x).square().mean().backward()
            plain.commit_memory(3)
            y = image(step).requires_grad_()
            checkpoint(recomputed, y, use_reentrant=reentrant).square().mean().backward()
            recomputed.commit_memory(3)
            assert torch.equal(x.grad, y.grad)
    expected, got = snapshot(plain), snapshot(recomputed)
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_a_masked_commit_keeps_the_values() -> None:
    for steps in (1, 25):
        block = make_block()
        train(block, 0, steps)
        before = snapshot(block)
        block(image(3)).sum().backward()
        block.commit_memory(3, keep=torch.tensor(False))
        after = snapshot(block)
        assert after.pop("bank._extra_state") == before.pop("bank._extra_state") + 1
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_forgotten_commit_is_an_error() -> None:
    block = make_block()
    block(image(0)).sum().backward()
    with pytest.raises(RuntimeError, match=r"never committed; call commit_memory\(\)"):
        block(image(1))
    block.bank.discard()
    block(image(1))


def test_a_batch_larger_than_the_bank_draws_one_token_an_image() -> None:
    block = make_block()
    block(image(0, batch=CLUSTERS * SLOTS + 5)).sum().backward()
    block.commit_memory(3)
    assert block.bank.memory.isfinite().all()


def test_an_empty_batch_writes_nothing() -> None:
    block = make_block()
    before = block.bank.memory.clone()
    block(image(0)[:0]).sum().backward()
    block.commit_memory(3)
    assert torch.equal(block.bank.memory, before)
