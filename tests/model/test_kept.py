"""What a forward pass keeps for its backward: less than autograd would, with the very same gradients."""

import pytest
import torch
from timm.layers import ConvMlp
from torch import Tensor, nn

from simmp_fast.config import ModelConfig
from simmp_fast.model import decoder, layers, lean
from simmp_fast.model.dmwla import DMWLABlock
from simmp_fast.model.memory import MemoryBank


def kept_storages(module: nn.Module, *inputs: object) -> tuple[Tensor, dict[int, int]]:
    """The result of a forward pass, and address and bytes of all that its backward will find again."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        return module(*inputs), kept


class Level(nn.Module):
    """A level of the decoder on a skip of its own."""

    def __init__(self) -> None:
        super().__init__()
        config = ModelConfig(decoder_feature_dim=8, decoder_clusters=2, slots=3)
        self.level = decoder.DecoderLevel(config, 12, 8, "level", "portable")
        self.spatial = layers.SpatialAttention()

    def forward(self, x: Tensor) -> Tensor:
        return self.level(x, [x.new_zeros(1), torch.ones(2, 8, 16, 16)], self.spatial)


def lean_mlp() -> nn.Module:
    return lean._Mlp(ConvMlp(12, 48, act_layer=nn.GELU))


def gate() -> nn.Module:
    image = torch.rand(2, 3, 8, 8)
    whole = layers.ImageGate(12)
    whole.register_forward_pre_hook(lambda module, inputs: (*inputs, image))
    return whole


@pytest.mark.parametrize("make", [gate, lambda: layers.UpBlock(12, 8), Level, lean_mlp])
def test_recomputing_keeps_less_and_changes_no_gradient(make, monkeypatch):
    found = {}
    for way in ("kept", "recomputed"):
        with monkeypatch.context() as patch:
            if way == "kept":
                for module in (lean, decoder, layers):
                    patch.setattr(module, "recomputed", lambda function, *inputs: function(*inputs))
            torch.manual_seed(7)
            module, x = make(), torch.randn(2, 12, 8, 8).requires_grad_()
            out, kept = kept_storages(module, x)
            out.square().sum().backward()
            gradients = [x.grad, *(p.grad for p in module.parameters() if p.grad is not None)]
            found[way] = out, gradients, sum(kept.values())
    (out, gradients, most), (again, others, least) = found["kept"], found["recomputed"]
    assert torch.equal(out, again)
    assert len(gradients) == len(others)
    assert all(torch.equal(a, b) for a, b in zip(gradients, others, strict=True))
    assert least < most


@pytest.mark.parametrize("channels", [6, 12], ids=["reassociated", "plain"])
@pytest.mark.parametrize("lowered", [False, True])
def test_the_bank_holds_no_tensor_of_its_own_over_the_backward_pass(channels, lowered):
    block = DMWLABlock(channels, 8, MemoryBank(2, 3, 8, warmup_steps=0), backend="portable").train()
    x = torch.randn(2, channels, 4, 4).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=lowered):
        out, kept = kept_storages(block, x)
    tokens, weight = block.bank._offered
    assert tokens.untyped_storage().data_ptr() in kept
    assert weight is block.momentum_key
    out.sum().backward()
    block.commit_memory(2)
    assert torch.isfinite(block.bank.memory).all()
