"""A step that is captured and replayed ends at the same bits as one that the host takes anew every time."""

from __future__ import annotations

import functools
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tape import TapeRecorder
from torch import Tensor
from training_stubs import TinyModel, assert_equal_runs, make_cache, tiny_config

from simmp_fast.config import Config, ConfigError
from simmp_fast.model import SimMPNet
from simmp_fast.training import loop
from simmp_fast.training.replay import EAGER_CALLS, Replays
from simmp_fast.training.step import TrainStep, make_optimizer

CPU = torch.device("cpu")


def config_of(warmup_steps: int = 4, backbone: str = "maxvit_rmlp_pico_rw_256", **train: Any) -> Config:
    config = tiny_config(backend="portable", **train)
    return replace(config, model=replace(config.model, warmup_steps=warmup_steps, backbone=backbone))


def steps(
    config: Config, count: int, recorder: TapeRecorder | None = None, wld_from: int = 10**6, wide: bool = False
) -> dict[str, Tensor]:
    """Everything that `count` steps leave behind; in float64 where they are `wide`."""
    dtype = torch.float64 if wide else torch.float32
    torch.manual_seed(0)
    model = SimMPNet(config.model, backend=config.train.backend).to(dtype).train()
    optimizer = make_optimizer(model, config.train)
    step = TrainStep(model, optimizer, config.train, CPU, recorder)
    generator = torch.Generator().manual_seed(1)
    losses = []
    torch.manual_seed(2)  # the backbone's dropout
    for number in range(count):
        images = torch.rand(2, 1, 64, 64, generator=generator, dtype=dtype)
        labels = torch.randint(3, (2, 64, 64), generator=generator)
        losses.append(step(images, labels, number, wld=number >= wld_from))
    assert step.guard.read() is None
    moments = {
        f"{index}.{name}": value
        for index, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
    }  # fmt: skip
    return {**model.state_dict(), **moments, "losses": torch.stack(losses), "sum": step.loss_sum}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def test_warm_up_structuring_and_update_replayed():
    """Two captures: of the warm-up, whose draws change at every step, and of the memory's update; then W-LD's."""
    count, wld_from = 6 + 6 + 5, 12
    config, recorder = config_of(warmup_steps=6), TapeRecorder()
    found = steps(config, count, recorder, wld_from)
    assert (recorder.captures, recorder.replays) == (3, count - 3 * EAGER_CALLS)
    assert_equal(found, steps(config, count, None, wld_from))


@pytest.mark.parametrize(("option", "warmup_steps"), [("channels_last", 1), ("compile", 4)])
def test_layout_and_compilation_change_rounding_alone(
    option: str, warmup_steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64: in float32 the split of DS-GIM turns a difference in rounding into one of gradients.

    Losses and memory are compared: AdamW makes whole steps of the gradients of biases before a batch norm, which are
    rounding and nothing else.
    """
    compiled = functools.partial(torch.compile, backend="aot_eager")  # traces as inductor does, in seconds
    monkeypatch.setattr(torch, "compile", compiled)
    torch._dynamo.reset()
    quick = "coatnet_pico_rw_224"  # to trace
    plain, other = (steps(config_of(warmup_steps, quick, **{option: on}), 3, wide=True) for on in (False, True))
    names = [name for name in plain if name.endswith(("losses", ".memory", ".prototypes"))]
    assert len(names) > 10
    for name in names:
        torch.testing.assert_close(other[name], plain[name], rtol=1e-8, atol=0, msg=name)


def test_channels_last_resumes_at_the_same_bits(tmp_path: Path):
    cache = make_cache(tmp_path / "cache", train=4, validation=0)
    config = config_of(channels_last=True, epochs=2)
    loop.train(config, cache, tmp_path / "straight", device="cpu")
    first = replace(config, train=replace(config.train, epochs=1))
    loop.train(first, cache, tmp_path / "run", device="cpu")
    loop.train(config, cache, tmp_path / "run", resume=True, device="cpu")
    assert_equal_runs(tmp_path / "run", tmp_path / "straight")


def stub_steps(recorder: TapeRecorder | None) -> dict[str, Tensor]:
    """The state after W-LD was off, remembered losses, and set the width, each for some steps."""
    config = tiny_config(backend="portable")
    torch.manual_seed(0)
    model = TinyModel(config.model).train()
    step = TrainStep(model, make_optimizer(model, config.train), config.train, CPU, recorder)
    torch.manual_seed(1)  # the stub's dropout
    for number in range(3 * (EAGER_CALLS + 2)):
        images, labels = torch.rand(2, 1, 16, 16), torch.randint(3, (2, 16, 16))
        step(images, labels, number, wld=(False, "remember", True)[number // (EAGER_CALLS + 2)])
        assert model.wld.seen == (number >= EAGER_CALLS + 2)
    return model.state_dict()


def test_what_wld_does_with_a_loss_is_part_of_the_key():
    recorder = TapeRecorder()
    found = stub_steps(recorder)
    assert (recorder.captures, recorder.replays) == (3, 6)
    assert_equal(found, stub_steps(None))


class Counter:
    """A recorder that only notes what it is asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def run(self, call):
        self.asked.append("run")
        return call()

    def capture(self, call):
        self.asked.append("capture")
        return lambda: self.run(call)

    def settle(self):
        self.asked.append("settle")

    def reclaim(self):
        self.asked.append("reclaim")


def test_another_key_is_another_capture():
    counter = Counter()
    replays = Replays(counter)
    for key in "aaaabaaaa":
        replays(key, lambda: torch.zeros(()))
    eager = ["run"] * EAGER_CALLS
    assert counter.asked == [*eager, "capture", "run", "settle", "reclaim", "run", *eager, "capture", "run"]
    assert replays.replaying


def test_what_a_dropped_capture_held_is_given_back():
    seen = []

    class Capture:
        def __call__(self) -> Tensor:
            return torch.zeros(())

    class Recorder(TapeRecorder):
        held: weakref.ref[Capture]

        def capture(self, call):
            capture = Capture()
            self.held = weakref.ref(capture)
            return capture

        def settle(self):
            seen.append(("settle", self.held() is not None))

        def reclaim(self):
            seen.append(("reclaim", self.held() is not None))

    replays = Replays(Recorder())
    for key in ["first"] * (EAGER_CALLS + 1) + ["second"] * 2:
        replays(key, lambda: torch.zeros(()))
    assert seen == [("settle", True), ("reclaim", False)]


def test_the_tape_holds_no_host_code():
    """The stand-in itself: a number of the host is a constant of the capture, a tensor in place is not."""
    place, number = torch.zeros(()), 0.0
    total = torch.zeros(())

    def call() -> Tensor:
        total.add_(place + number)
        return total

    replay = TapeRecorder().capture(call)
    assert float(total) == 0
    place, number = place.fill_(1.0), 5.0
    assert float(replay()) == 1
    assert float(replay()) == 2


def test_what_waits_for_the_device_is_not_captured():
    with pytest.raises(AssertionError, match="reads a number"):
        TapeRecorder().capture(lambda: torch.full((), torch.ones(()).item()))


def test_a_graph_needs_a_gpu(tmp_path):
    config = tiny_config(cuda_graph=True)
    with pytest.raises(ConfigError, match="train.cuda_graph: got true on cpu, expected a CUDA device"):
        loop.train(config, make_cache(tmp_path / "cache"), tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()
