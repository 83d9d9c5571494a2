"""The phase of a bank lies in a buffer: copies, averages and saved states take it along, and no step reads it."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch
from no_sync import NoHostSync
from test_memory_life import image, make_block, train
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from simmp_fast.model import DMWLABlock, UpdateWidth
from simmp_fast.model.pretrained import load_strict

WARMUP = 3
Update = Callable[[nn.Module], None]


class Follower:
    """A copy that is brought up to date by a function."""

    def __init__(self, model: nn.Module, update: Callable[[nn.Module, nn.Module], None]) -> None:
        self.module = copy.deepcopy(model)
        self._update = update

    def update(self, model: nn.Module) -> None:
        self._update(self.module, model)


@torch.no_grad()
def floating_entries(copied: nn.Module, model: nn.Module) -> None:
    state = model.state_dict()
    for name, value in copied.state_dict().items():
        if value.dtype.is_floating_point:
            value *= 0.3
            value += 0.7 * state[name].detach()


@torch.no_grad()
def copied_buffers(copied: nn.Module, model: nn.Module) -> None:
    for own, other in zip(copied.buffers(), model.buffers(), strict=True):
        own.copy_(other)


def written_data(copied: nn.Module, model: nn.Module) -> None:
    for own, other in zip(copied.buffers(), model.buffers(), strict=True):
        own.data.copy_(other.data)


def assigned_data(copied: nn.Module, model: nn.Module) -> None:
    for own, other in zip(copied.buffers(), model.buffers(), strict=True):
        own.data = other.data.clone()


FOLLOWERS = {
    "AveragedModel": AveragedModel,
    "AveragedModel of buffers": functools.partial(AveragedModel, use_buffers=True),
    "AveragedModel with a decay": functools.partial(
        AveragedModel, multi_avg_fn=get_ema_multi_avg_fn(0.3), use_buffers=True
    ),
    "ModelEmaV2": functools.partial(ModelEmaV2, decay=0.3),
    "ModelEmaV3": functools.partial(ModelEmaV3, decay=0.3),
    "ModelEmaV3 one by one": functools.partial(ModelEmaV3, decay=0.3, foreach=False),
    "floating entries": functools.partial(Follower, update=floating_entries),
    "copied buffers": functools.partial(Follower, update=copied_buffers),
    "written data": functools.partial(Follower, update=written_data),
    "assigned data": functools.partial(Follower, update=assigned_data),
}


class Network(nn.Module):
    """A block with its bank, and the buffers of other kinds that a network has."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(6)
        self.block = make_block(warmup_steps=WARMUP)
        self.wld = UpdateWidth(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.norm(x))


def structured_block(**options: int) -> DMWLABlock:
    block = make_block(warmup_steps=WARMUP, **options)
    train(block, 0, WARMUP + 2)
    return block


def attends_to_memory(block: DMWLABlock) -> bool:
    """Whether the forward pass depends on the bank."""
    with torch.no_grad():
        before = block(image(0))
        other = copy.deepcopy(block)
        other.bank.memory.add_(1)
        return not torch.equal(other(image(0)), before)


@pytest.mark.parametrize("name", list(FOLLOWERS))
@pytest.mark.parametrize("evaluated", [False, True], ids=["evaluated at the end", "evaluated at every step"])
def test_a_copy_that_follows_a_network_follows_its_phase(name: str, evaluated: bool) -> None:
    network = Network()
    follower = FOLLOWERS[name](network)
    update = follower.update_parameters if isinstance(follower, AveragedModel) else follower.update
    if evaluated:
        follower.module.eval()
    for step in range(WARMUP + 12):
        loss = network(image(step)).square().mean()
        loss.backward()
        network.block.commit_memory(3)
        network.wld.step(loss)
        update(network)
        if evaluated and step < WARMUP - 1:
            assert follower.module.block.bank.warming
            assert not attends_to_memory(follower.module.block)
    block = follower.module.eval().block
    assert not block.bank.warming
    assert block.bank.step >= WARMUP
    assert attends_to_memory(block)
    with torch.no_grad():
        assert follower.module(image(0)).isfinite().all()


def test_an_average_is_structured_from_one_half_on() -> None:
    block = make_block(warmup_steps=WARMUP)
    with torch.no_grad():
        for value, warming in ((0.49, True), (0.5, False), (0.49, True), (float("nan"), True)):
            block.bank.structured.fill_(value)
            assert block.bank.warming == warming
            assert (block.bank.step < WARMUP) == warming


def test_a_copied_phase_never_structures_again(monkeypatch: pytest.MonkeyPatch) -> None:
    block, source = make_block(warmup_steps=WARMUP), structured_block()
    copied_buffers(block, source)
    monkeypatch.setattr("simmp_fast.model.memory.structure", lambda *_: pytest.fail("structured once more"))
    assert block.bank.step == WARMUP
    train(block, 0, 3)
    assert block.bank.step == WARMUP + 3
    assert torch.equal(block.bank.structured, torch.tensor(1.0))


def test_a_structured_bank_that_gets_a_warm_one_is_structured_by_its_next_step() -> None:
    block = structured_block()
    copied_buffers(block, make_block(warmup_steps=WARMUP))
    assert block.bank.warming
    assert block.bank.step == WARMUP - 1
    train(block, 0, 1)
    assert not block.bank.warming


def test_writes_past_the_version_are_seen_when_the_mode_is_set() -> None:
    block = structured_block()
    assigned_data(block, make_block(warmup_steps=WARMUP))
    written_data(block, make_block(warmup_steps=WARMUP))
    assert block.eval().bank.warming


@pytest.mark.parametrize("count", [0, WARMUP - 1, WARMUP, WARMUP + 5])
@pytest.mark.parametrize("strict", [False, True], ids=["load_state_dict", "load_strict"])
def test_a_state_without_a_phase_takes_it_from_the_counter(count: int, strict: bool) -> None:
    state = structured_block().state_dict()
    del state["bank.structured"]
    state["bank._extra_state"] = torch.tensor(count)
    block = make_block(warmup_steps=WARMUP)
    if strict:
        load_strict(block, state, "a file")
    else:
        block.load_state_dict(state)
    assert "bank.structured" not in state, "the caller's dict is left alone"
    assert (block.bank.step, block.bank.warming) == (count, count < WARMUP)
    assert float(block.bank.structured) == (count >= WARMUP)


@pytest.mark.parametrize(
    ("value", "count", "step"), [(1.0, 1, WARMUP), (0.75, 9, 9), (0.25, 9, WARMUP - 1), (0.0, 1, 1)]
)
def test_where_phase_and_counter_disagree_the_phase_wins(value: float, count: int, step: int) -> None:
    state = make_block(warmup_steps=WARMUP).state_dict()
    state["bank.structured"].fill_(value)
    state["bank._extra_state"] = torch.tensor(count)
    block = structured_block()
    block.load_state_dict(state)
    assert (block.bank.step, block.bank.warming, float(block.bank.structured)) == (step, value < 0.5, value)


def test_a_flag_of_bool_is_loaded_as_a_number() -> None:
    width = UpdateWidth(8)
    width.load_state_dict(width.state_dict() | {"seen": torch.tensor(True)})
    assert width.seen.dtype == torch.int64
    assert width.seen == 1


@pytest.mark.parametrize("structured", [True, False])
def test_a_phase_that_was_lent_leaves_no_trace(structured: bool) -> None:
    block, other = structured_block(), make_block(warmup_steps=WARMUP)
    if not structured:
        block, other = other, block
    step = block.bank.step
    torch.func.functional_call(block.eval(), dict(other.named_buffers()), (image(0),))
    assert (block.bank.step, block.bank.warming) == (step, not structured)
    own = [value.clone() for value in block.buffers()]
    copied_buffers(block, other)
    assert block.bank.warming == structured
    with torch.no_grad():
        for value, mine in zip(block.buffers(), own, strict=True):
            value.copy_(mine)
    assert (block.bank.step, int(block.bank.get_extra_state())) == (step, step)


def test_compiled_evaluation_follows_an_average() -> None:
    torch._dynamo.reset()
    block, averaged = make_block(warmup_steps=WARMUP), make_block(warmup_steps=WARMUP).eval()
    compiled = torch.compile(averaged, backend="eager", fullgraph=True)
    for step in range(WARMUP + 2):
        copied_buffers(averaged, block)
        with torch.no_grad():
            torch.testing.assert_close(compiled(image(step)), copy.deepcopy(averaged)(image(step)))
        train(block, step, step + 1)
    copied_buffers(averaged, block)
    assert averaged.bank._warming, "nobody has looked but the device"
    with torch.no_grad():
        torch.testing.assert_close(compiled(image(0)), copy.deepcopy(averaged)(image(0)))


def test_banks_stacked_by_vmap_have_one_phase() -> None:
    blocks = [structured_block().eval() for _ in range(2)]
    parameters, buffers = torch.func.stack_module_state(blocks)
    base, x = copy.deepcopy(blocks[0]), image(0)

    def call(own: dict[str, Tensor], state: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(base, (own, state), (x,))

    found = torch.vmap(call)(parameters, buffers)
    for one, block in zip(found, blocks, strict=True):
        torch.testing.assert_close(one, block(x))
    buffers["bank.structured"][1] = 0
    with pytest.raises(ValueError, match="got memory banks in both phases"):
        torch.vmap(call)(parameters, buffers)


def test_a_life_under_another_default_device() -> None:
    block, loaded = make_block(warmup_steps=WARMUP), make_block(warmup_steps=WARMUP)
    for step in range(WARMUP + 2):
        block(image(step)).square().mean().backward()
        with torch.device("meta"):
            block.bank.prepare()
            block.bank.advance()
            state = block.state_dict()
            loaded.load_state_dict(state)
        block.bank.discard()
        assert loaded.bank.step == block.bank.step == step + 1
    assert torch.equal(loaded.bank.memory, block.bank.memory)


def test_neither_steps_nor_copying_buffers_reads_the_device() -> None:
    block, averaged = make_block(warmup_steps=WARMUP), make_block(warmup_steps=WARMUP)
    block.bank.backend = "portable"
    for step in range(WARMUP + 2):
        block(image(step)).sum().backward()
        block.bank.prepare()
        with NoHostSync():
            block.write_memory(torch.tensor(3))
            if step != WARMUP - 1:
                block.bank.advance()
            copied_buffers(averaged, block)
            floating_entries(averaged, block)
        if step == WARMUP - 1:
            block.bank.advance()
        with NoHostSync():
            block(image(step)).sum()
        block.bank.discard()


def test_one_compiled_forward_a_phase() -> None:
    traces = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable:
        traces.append(graph)
        return graph.forward

    torch._dynamo.reset()
    block = make_block(warmup_steps=WARMUP)
    compiled = torch.compile(block, backend=backend, fullgraph=True)
    phases = []
    for step in range(WARMUP + 3):
        expected = copy.deepcopy(block)(image(step))
        torch.testing.assert_close(compiled(image(step)), expected)
        phases.append(len(traces))
        block.bank.prepare()
        block.write_memory(3)
        block.bank.advance()
    assert phases == [1] * WARMUP + [2] * 3


@pytest.mark.parametrize("place", ["meta", "inference"])
def test_banks_without_values_or_without_versions(place: str) -> None:
    if place == "meta":
        with torch.device("meta"):
            block = make_block(warmup_steps=WARMUP).eval()
            assert block.bank.warming
            block.bank.set_extra_state(torch.tensor(WARMUP, device="cpu"))
            assert not block.bank.warming
        return
    with torch.inference_mode():
        block = make_block(warmup_steps=WARMUP)
        copied_buffers(block, structured_block_outside())
        assert not block.eval().bank.warming
        assert attends_to_memory(block)


def structured_block_outside() -> DMWLABlock:
    with torch.inference_mode(False), torch.enable_grad():
        return structured_block()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("backend", ["reference", "portable"])
def test_a_whole_life_in_another_dtype(dtype: torch.dtype, backend: str) -> None:
    block = make_block(warmup_steps=2).to(dtype)
    block.backend = block.bank.backend = backend
    for step in range(4):
        block(image(step).to(dtype)).square().mean().backward()
        block.commit_memory(3)
    assert (block.bank.step, block.bank.warming, float(block.bank.structured)) == (4, False, 1.0)
    assert {tensor.dtype for tensor in block.bank.buffers()} == {dtype}
    assert block.bank.memory.isfinite().all()
    assert attends_to_memory_in(block.eval(), dtype)
    widened = copy.deepcopy(block).float()
    assert not widened.bank.warming


def attends_to_memory_in(block: DMWLABlock, dtype: torch.dtype) -> bool:
    with torch.no_grad():
        before = block(image(0).to(dtype))
        block.bank.memory.add_(1)
        after = block(image(0).to(dtype))
        block.bank.memory.sub_(1)
    return not torch.equal(before, after)
