"""The network: shapes, options, saving and loading, released checkpoints, bad input."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from golden_data import released_state_dict
from torch import Tensor

from simmp_fast.config import ConfigError, ModelConfig
from simmp_fast.model import SimMPNet, UpdateWidth


def make(config: ModelConfig, seed: int = 0) -> SimMPNet:
    torch.manual_seed(seed)
    return SimMPNet(config, backend="reference")


def image(config: ModelConfig, batch: int = 2, seed: int = 0, size: int | None = None) -> Tensor:
    size = config.image_size if size is None else size
    return torch.rand(batch, config.in_channels, size, size, generator=torch.Generator().manual_seed(seed))


def step(model: SimMPNet, seed: int) -> None:
    torch.manual_seed(seed)  # the backbone's position network has dropout
    model.train()
    torch.stack(model(image(model.config, seed=seed))).square().mean().backward()
    model.commit_memory()


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_heads(tiny: ModelConfig, channels: int) -> None:
    model = make(replace(tiny, in_channels=channels)).eval()
    x = image(model.config)
    assert [tuple(h.shape) for h in model(x)] == [(2, 3, 64, 64)] * 4
    native = model(x, native_heads=True)
    assert [tuple(h.shape) for h in native] == [(2, 3, s, s) for s in (2, 4, 8, 16)]
    for full, low in zip(model(x), native, strict=True):
        resized = torch.nn.functional.interpolate(low, (64, 64), mode="bilinear")
        torch.testing.assert_close(full, resized)
    assert torch.equal(model.segment(x), torch.stack(model(x)).sum(0).softmax(1).argmax(1))


def test_working_sizes_may_differ(tiny: ModelConfig) -> None:
    model = make(replace(tiny, dmwla_size=96)).eval()
    assert [h.shape[-1] for h in model(image(tiny), native_heads=True)] == [3, 6, 12, 24]
    assert model(image(tiny, size=50))[0].shape[-1] == 64, "any input size is brought to S1"


@pytest.mark.parametrize("backbone", ["coatnet_nano_rw_224", "maxvit_tiny_tf_224"])
def test_other_backbones(tiny: ModelConfig, backbone: str) -> None:
    model = make(replace(tiny, backbone=backbone)).eval()
    heads = model(image(tiny))
    assert all(h.shape == (2, 3, 64, 64) and h.isfinite().all() for h in heads)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dmwla_size": 32}, r"model.dmwla_size: got 32, whose third-stage grid of 2x2 tokens no window"),
        ({"window": 3}, r"model.window: got 3, expected one of 2 for a grid of 4x4"),
        ({"dmwla_size": 100}, "model.dmwla_size: got 100, expected a multiple of 32"),
        ({"variant": "mine"}, "model.variant: got 'mine'"),
        ({"backbone": "resnet18"}, "model.backbone: got 'resnet18'"),
        ({"backbone": "no_such_model"}, "model.backbone: got 'no_such_model'"),
        ({"classes": 1}, "model.classes: got 1"),
    ],
)
def test_a_configuration_that_does_not_fit(tiny: ModelConfig, changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SimMPNet(replace(tiny, **changes))


def test_the_released_window_is_seven() -> None:
    assert ModelConfig().resolved_window() == 7


def test_wrong_input(tiny: ModelConfig) -> None:
    model = make(tiny)
    with pytest.raises(ValueError, match=r"image: got shape \[2, 3, 64, 64\], expected \[B, C=1, H, W\]"):
        model(torch.zeros(2, 3, 64, 64))
    for shape in ([0, 1, 64, 64], [2, 1, 0, 64]):
        message = f"image: got shape {shape}, expected at least one image"
        for call in (model, model.segment, model.eval()):
            with pytest.raises(ValueError, match=re.escape(message)):
                call(torch.zeros(shape))
        model.train()
    with pytest.raises(TypeError, match="image: got dtype torch.uint8"):
        model(torch.zeros(2, 1, 64, 64, dtype=torch.uint8))
    with pytest.raises(ValueError, match="backend: got 'cuda'"):
        SimMPNet(tiny, backend="cuda")


def test_phase_and_one_clock(tiny: ModelConfig) -> None:
    model = make(tiny)
    for i in range(6):
        assert model.memory_step == i
        assert model.memory_phase == ("warmup" if i < 4 else "structured")
        step(model, i)
    assert {block.bank.step for block in model.memory_blocks()} == {6}
    assert len(list(model.memory_blocks())) == 8


def test_evaluation_never_changes_the_state(tiny: ModelConfig) -> None:
    model = make(tiny)
    for i in range(5):
        step(model, i)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    model.eval()
    torch.stack(model(image(tiny))).sum().backward()
    after = model.state_dict()
    assert all(torch.equal(before[n], after[n]) for n in before)


@pytest.mark.parametrize("changes", [{}, {"in_channels": 3, "variant": "released"}], ids=["plain", "released"])
def test_every_parameter_but_the_unread_gate_is_trained(tiny: ModelConfig, changes: dict) -> None:
    model = make(replace(tiny, warmup_steps=1, **changes))
    unread = {"decoder.channel_attention.squeeze.weight", "decoder.channel_attention.expand.weight"}
    model.requires_grad_(False).requires_grad_(True)  # frozen for a while
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == unread
    for i, phase in enumerate(("warmup", "structured")):
        model.zero_grad()
        assert model.memory_phase == phase
        step(model, i)
        assert {n for n, p in model.named_parameters() if p.grad is None} == unread


def test_save_and_load(tiny: ModelConfig, tmp_path: Path) -> None:
    model = make(tiny)
    for i in range(5):
        step(model, i)
    model.save_pretrained(tmp_path / "net")
    loaded = SimMPNet.from_pretrained(tmp_path / "net", backend="reference")
    assert loaded.config == tiny
    assert loaded.memory_step == 5
    expected = model.state_dict()
    assert all(torch.equal(expected[n], t) for n, t in loaded.state_dict().items())
    step(model, 9)
    step(loaded, 9)
    expected = model.state_dict()
    assert all(torch.equal(expected[n], t) for n, t in loaded.state_dict().items())


def test_damaged_or_foreign_folders(tiny: ModelConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        SimMPNet.from_pretrained(tmp_path / "nowhere")
    make(tiny).save_pretrained(tmp_path)
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ConfigError, match="model.safetensors: cannot be read as safetensors"):
        SimMPNet.from_pretrained(tmp_path)
    make(replace(tiny, classes=5)).save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").write_bytes(weights)
    with pytest.raises(ConfigError, match=r"config.json: differs .*: classes is 5, saved as 3; restore it"):
        SimMPNet.from_pretrained(tmp_path / "other")
    (tmp_path / "config.json").write_text('{"clases": 3}')
    with pytest.raises(ConfigError, match="clases: unknown key"):
        SimMPNet.from_pretrained(tmp_path)


def test_released_checkpoint_from_a_file(tmp_path: Path) -> None:
    state = released_state_dict()
    path = tmp_path / "released.pth"
    torch.save({f"module.{name}": tensor for name, tensor in state.items()}, path)
    model = SimMPNet.from_released(path)
    assert model.config == ModelConfig(variant="released")
    assert model.memory_phase == "structured"
    assert model.wld.k == 50
    bank = model.encoder.stages[0].blocks[0].bank
    assert torch.equal(bank.memory[2, 5], state["DMWLA_1.0.concept_pool"][:, 205])
    assert torch.equal(bank.prototypes[2], state["DMWLA_1.0.concept_proto"][:, 2])
    block = model.decoder.attend
    assert torch.equal(block.momentum_key, state["decoder.DMWLA_4.phi.weight"].flatten(1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("out_head1.weight"), "'out_head1.weight' is missing"),
        (lambda s: s.pop("DMWLA_1.0.o.weight"), r"1 missing \(first: encoder.stages.0.blocks.0.output.weight\)"),
        (lambda s: s.update(surprise=torch.zeros(1)), "'surprise', which the released network does not have"),
        (lambda s: s.update({"out_head2.bias": torch.zeros(3)}), r"1 of another shape \(first: heads.1.bias\)"),
    ],
)
def test_a_checkpoint_that_is_not_the_released_network(change, message: str) -> None:
    state = dict(released_state_dict())
    change(state)
    with pytest.raises(ConfigError, match=message):
        SimMPNet.from_released(state)


def test_a_released_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        SimMPNet.from_released(tmp_path / "missing.pth")
    (tmp_path / "broken.pth").write_bytes(b"not a checkpoint")
    with pytest.raises(ConfigError, match="broken.pth: cannot be read as a checkpoint"):
        SimMPNet.from_released(tmp_path / "broken.pth")


def test_update_width_in_other_banks() -> None:
    width = UpdateWidth(20)
    assert width.k == 10
    for loss, k in ((1.0, 10), (0.8, 8), (0.8, 10), (0.0, 10), (0.4, 14), (float("nan"), 14), (0.4, 10)):
        width.step(torch.tensor(loss))
        assert width.k == k, loss
    one = UpdateWidth(1)
    one.step(torch.tensor(1.0))
    one.step(torch.tensor(1.0))
    assert one.k == 1


@pytest.mark.parametrize("assign", [False, True], ids=["to_empty", "assign"])
def test_a_network_made_on_the_meta_device_is_whole_once_loaded(tiny: ModelConfig, assign: bool) -> None:
    source = make(tiny).eval()
    with torch.device("meta"):
        model = make(tiny, 1).eval()
    if not assign:
        model = model.to_empty(device="cpu")
        for value in model.buffers():
            value.zero_()
    model.load_state_dict(source.state_dict(), assign=assign)
    assert torch.equal(model(image(tiny))[3], source(image(tiny))[3])


def test_torch_func_sees_through_the_whole_network(tiny: ModelConfig) -> None:
    model = SimMPNet(tiny).eval()
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    x = image(tiny)

    def loss(own: dict[str, Tensor], pixels: Tensor) -> Tensor:
        return torch.func.functional_call(model, own, (pixels,))[3].square().mean()

    found = torch.func.grad(loss)(parameters, x)
    loss(dict(model.named_parameters()), x).backward()
    for name, value in model.named_parameters():
        if value.grad is not None:
            torch.testing.assert_close(found[name], value.grad, rtol=1e-4, atol=1e-6)
    along = {name: torch.zeros_like(value) for name, value in parameters.items()}
    _, slope = torch.func.jvp(loss, (parameters, x), (along | {"heads.3.bias": torch.ones(tiny.classes)}, x * 0))
    torch.testing.assert_close(slope, found["heads.3.bias"].sum(), rtol=1e-4, atol=1e-6)
    each = torch.vmap(torch.func.grad(loss, argnums=1), in_dims=(None, 0))(parameters, x.unsqueeze(1))
    assert each.shape == (2, 1, *x.shape[1:])
    assert each.isfinite().all()
