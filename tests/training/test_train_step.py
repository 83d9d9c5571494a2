from __future__ import annotations

import copy
import math

import pytest
import torch
from training_stubs import TinyModel, tiny_config

from simmp_fast.training.step import FiniteGuard, TrainStep, make_optimizer

CPU = torch.device("cpu")
CONFIG = tiny_config()


def batch(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(2, 1, 16, 16, generator=generator), torch.randint(3, (2, 16, 16), generator=generator)


def make_step(**train) -> TrainStep:
    config = tiny_config(**train)
    torch.manual_seed(0)
    model = TinyModel(config.model).train()
    return TrainStep(model, make_optimizer(model, config.train), config.train, CPU)


def written(step: TrainStep) -> dict[str, torch.Tensor]:
    """Copies of all that a bad step must not touch."""
    state = {f"p{i}": p for i, p in enumerate(step.parameters)} | {"memory": step.model.memory}
    for i, values in enumerate(step.optimizer.state_dict()["state"].values()):
        state |= {f"{name}{i}": value for name, value in values.items()}
    return {name: value.detach().clone() for name, value in state.items()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def test_a_step_learns_and_writes_the_memory():
    step = make_step()
    before = written(step)
    first = float(step(*batch(0), 0, wld=False))
    after = written(step)
    assert not torch.equal(before["memory"], after["memory"])
    assert not torch.equal(before["p0"], after["p0"])
    for i in range(1, 30):
        last = float(step(*batch(0), i, wld=False))
    assert last < first
    assert step.guard.read() is None


def test_the_masked_step_equals_a_plain_fused_step():
    step = make_step(lr=0.01)
    plain = copy.deepcopy(step.model)
    optimizer = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], lr=0.01, weight_decay=1e-4)
    torch.manual_seed(1)
    step(*batch(0), 0, wld=False)
    torch.manual_seed(1)
    from simmp_fast import ops

    images, labels = batch(0)
    ops.powerset_loss(plain(images, native_heads=True), labels, backend="reference").backward()
    optimizer.step()
    for mine, theirs in zip(step.model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_frozen_parameter_keeps_its_place_and_its_value():
    model = TinyModel(CONFIG.model).train()
    saved = make_optimizer(model, CONFIG.train).state_dict()
    model.heads[1].requires_grad_(False)
    optimizer = make_optimizer(model, CONFIG.train)
    optimizer.load_state_dict(saved)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    TrainStep(model, optimizer, CONFIG.train, CPU)(*batch(0), 0, wld=False)
    moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert moved == [parameter.requires_grad for parameter in model.parameters()]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_loss_freezes_parameters_moments_and_memory(value):
    step = make_step()
    for i in range(3):
        step(*batch(i), i, wld=True)
    before, width = written(step), step.model.wld.state_dict()
    width = {name: v.clone() for name, v in width.items()}
    images, labels = batch(3)
    images[0, 0, 3, 3] = value
    step(images, labels, 3, wld=True)
    assert_same(written(step), before)
    assert_same(step.model.wld.state_dict(), width)
    bad = step.guard.read()
    assert bad is not None
    assert bad.step == 3
    assert not math.isfinite(bad.loss)
    assert "the loss is" in bad.describe()
    step(*batch(4), 4, wld=False)  # until somebody looks, nothing else is written either
    assert_same(written(step), before)
    assert step.guard.read().step == 3


def test_bad_gradients_with_a_finite_loss_are_caught():
    step = make_step()
    step(*batch(0), 0, wld=False)
    before = written(step)
    handle = step.model.heads[2].weight.register_hook(lambda gradient: gradient * math.inf)
    step(*batch(1), 1, wld=False)
    handle.remove()
    assert_same(written(step), before)
    bad = step.guard.read()
    assert bad is not None
    assert bad.step == 1
    assert math.isfinite(bad.loss)
    assert "the gradients are not finite (loss" in bad.describe()


def test_huge_but_finite_gradients_pass():
    guard = FiniteGuard(CPU)
    keep = guard.check(torch.tensor(1.0), [torch.full((4,), 3e38), torch.full((2, 2), -1e30)], torch.tensor(0))
    assert bool(keep)
    assert guard.read() is None


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 1])
def test_one_bad_gradient_among_many(wrong, place):
    gradients = [torch.zeros(1000), torch.zeros(10, 10)]
    gradients[place].view(-1)[7] = wrong
    guard = FiniteGuard(CPU)
    assert not bool(guard.check(torch.tensor(1.0), gradients, torch.tensor(5)))
    assert guard.read().step == 5


def test_the_sum_of_losses():
    step = make_step()
    losses = [float(step(*batch(i), i, wld=False)) for i in range(3)]
    assert float(step.loss_sum) == pytest.approx(sum(losses))


def test_wld_only_when_asked():
    step = make_step()
    step(*batch(0), 0, wld=False)
    assert not bool(step.model.wld.seen)
    first = step(*batch(2), 2, wld="remember")
    assert bool(step.model.wld.seen)
    assert float(step.model.wld.previous) == float(first)
    assert step.model.wld.k == step.model.wld.start
    loss = step(*batch(1), 1, wld=True)
    assert bool(step.model.wld.seen)
    assert float(step.model.wld.previous) == float(loss)


def test_bfloat16_autocast_keeps_parameters_and_loss_in_float32():
    step = make_step(precision="bfloat16")
    seen = []
    step.model.heads[0].register_forward_hook(lambda *args: seen.append(args[2].dtype))
    loss = step(*batch(0), 0, wld=False)
    assert seen == [torch.bfloat16]
    assert loss.dtype == torch.float32
    assert math.isfinite(float(loss))
    assert all(p.dtype == torch.float32 for p in step.parameters)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_step_never_waits_for_the_gpu():
    config = tiny_config(backend="auto")
    device = torch.device("cuda")
    model = TinyModel(config.model).train().to(device)
    step = TrainStep(model, make_optimizer(model, config.train), config.train, device)
    batches = [tuple(t.pin_memory() for t in batch(i)) for i in range(3)]
    step(*batches[0], 0, wld=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for i in (1, 2):
            step(*batches[i], i, wld=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert step.guard.read() is None
