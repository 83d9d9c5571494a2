"""The network on the portable backend: it equals the reference, compiles whole, never syncs, and exports."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from no_sync import NoHostSync
from torch import Tensor

from simmp_fast import ops
from simmp_fast.config import ModelConfig
from simmp_fast.model import SimMPNet


@pytest.fixture(scope="module")
def light(tiny: ModelConfig) -> ModelConfig:
    """The tiny network with a backbone that is quick to trace, and blocks on both sides of the reassociation rule."""
    return replace(tiny, backbone="coatnet_pico_rw_224", feature_dim=80, warmup_steps=1)


def make(config: ModelConfig, backend: str = "portable") -> SimMPNet:
    torch.manual_seed(0)
    model = SimMPNet(config, backend=backend)
    flags = {block.reassociates for block in model.memory_blocks()}
    assert flags == ({True, False} if backend == "portable" else {False})
    return model


def batch(config: ModelConfig, size: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(size)
    side = config.image_size
    image = torch.rand(size, 1, side, side, generator=generator, dtype=dtype)
    return image, torch.randint(config.classes, (size, side, side), generator=generator)


def loss_of(model: SimMPNet, image: Tensor, label: Tensor) -> Tensor:
    return ops.powerset_loss(model(image, native_heads=True), label, backend=model.backend)


def warm_up(model: SimMPNet) -> None:
    """Take the one step of warm-up that the configuration asks for."""
    loss_of(model, *batch(model.config, 2, next(model.parameters()).dtype)).backward()
    model.commit_memory()
    model.zero_grad()
    assert model.memory_phase == "structured"


def test_training_steps_equal_the_reference(light: ModelConfig) -> None:
    """Three steps in float64: losses, gradients, banks, momentum keys and the update width agree."""
    models = [make(light, name).double() for name in ("reference", "portable")]
    for step in range(3):
        losses = []
        for model in models:
            torch.manual_seed(step)  # the backbone's dropout
            model.zero_grad()
            loss = loss_of(model, *batch(light, 2 + step, torch.float64))
            loss.backward()
            model.commit_memory()
            model.wld.step(loss)
            losses.append(loss)
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-9, atol=0)
        for (name, one), two in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
            assert (one.grad is None) == (two.grad is None), name
            if one.grad is not None:
                scale = float(one.grad.abs().max())
                torch.testing.assert_close(two.grad, one.grad, rtol=1e-6, atol=1e-8 * max(scale, 1e-3), msg=name)
    reference, portable = (model.state_dict() for model in models)
    for name in reference:
        torch.testing.assert_close(portable[name], reference[name], rtol=1e-8, atol=1e-9, msg=name)


def test_a_training_step_never_syncs(light: ModelConfig) -> None:
    model = make(light)
    warm_up(model)
    image, label = batch(light, 2)
    keep = torch.tensor(True)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    with NoHostSync():
        loss = loss_of(model, image, label)
        loss.backward()
        model.commit_memory(keep)
        optimizer.step()
        model.wld.step(loss)


def test_the_training_step_compiles_whole(light: ModelConfig) -> None:
    """Forward and loss, the memory's write, and W-LD: each one graph, with two batch sizes, equal to eager.

    Autograd cuts a training step at ``backward()``; the pieces on either side of it are captured without a break.
    ``aot_eager`` traces forward and backward as `inductor` does, without minutes of C++ compilation. In float64: in
    float32 the split of DS-GIM turns a difference in rounding into one of gradients.
    """
    eager, compiled = make(light).double(), make(light).double()
    for model in (eager, compiled):
        warm_up(model)
    forward = torch.compile(lambda *b: loss_of(compiled, *b), fullgraph=True, backend="aot_eager")
    write = torch.compile(compiled.write_memory, fullgraph=True, backend="aot_eager")
    wld = torch.compile(compiled.wld.step, fullgraph=True, backend="aot_eager")
    keep = torch.tensor(True)
    for size in (2, 3):
        losses = []
        for model in (eager, compiled):
            torch.manual_seed(size)
            model.zero_grad()
            inputs = batch(light, size, torch.float64)
            loss = loss_of(eager, *inputs) if model is eager else forward(*inputs)
            loss.backward()
            losses.append(loss.detach())
        eager.commit_memory(keep)
        eager.wld.step(losses[0])
        write(keep)
        for block in compiled.memory_blocks():
            block.bank.advance()
        wld(losses[1])
        torch.testing.assert_close(losses[1], losses[0])
        for (name, one), two in zip(eager.named_parameters(), compiled.parameters(), strict=True):
            if one.grad is not None:
                torch.testing.assert_close(two.grad, one.grad, rtol=1e-6, atol=1e-9, msg=name)
    for (name, one), two in zip(eager.named_buffers(), compiled.buffers(), strict=True):
        torch.testing.assert_close(two, one, rtol=1e-6, atol=1e-9, msg=name)


def test_export_in_evaluation_mode(light: ModelConfig) -> None:
    model = make(light)
    warm_up(model)
    model.eval()
    image, _ = batch(light, 2)
    program = torch.export.export(model, (image,))
    for exported, expected in zip(program.module()(image), model(image), strict=True):
        torch.testing.assert_close(exported, expected)
