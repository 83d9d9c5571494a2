"""timm's modules under their own names, laid out for less memory and time (the backbone of section 1)."""

from __future__ import annotations

from typing import Any, cast

import timm.layers
import torch
import torch.nn.functional as F
from timm.layers.pos_embed_rel import gen_relative_position_index
from torch import Tensor, nn

from ..validation import transformed
from .layers import recomputed


def make_lean(network: nn.Module) -> None:
    """Put leaner modules in place of those of a timm network that have one; names and results stay."""
    for parent in network.modules():
        for name, module in parent.named_children():
            if isinstance(module, timm.layers.ConvMlp) and module.drop.p == 0:
                setattr(parent, name, _Mlp(module))
            elif _widens_depthwise(module):
                setattr(parent, name, _WideningDepthwise(cast(nn.Conv2d, module)))
            elif isinstance(module, timm.layers.RelPosMlp) and module.mode != "swin" and not module.prefix_tokens:
                setattr(parent, name, _RelativePosition(module))


class _Mlp(nn.Module):
    """`ConvMlp` without keeping its activations, of the largest tensors of a step."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.fc1, self.norm, self.act, self.fc2 = mlp.fc1, mlp.norm, mlp.act, mlp.fc2

    def forward(self, x: Tensor) -> Tensor:
        return recomputed(self._activate, self.norm(self.fc1(x)))

    def _activate(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(x))


def _widens_depthwise(module: nn.Module) -> bool:
    """Whether this is a convolution that makes several channels of each one."""
    return (
        type(module) is nn.Conv2d
        and 1 < module.groups == module.in_channels < module.out_channels
        and isinstance(module.padding, tuple)
        and module.padding_mode == "zeros"
    )


class _WideningDepthwise(nn.Module):
    """A convolution that makes several channels of each one, as that many depthwise ones where channels are last.

    With several outputs a group and channels-last tensors cuDNN takes a launch a group, and a CPU three times the time.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self.how = (conv.stride, cast("tuple[int, int]", conv.padding), conv.dilation, conv.groups)

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_contiguous(memory_format=torch.channels_last):
            return F.conv2d(x, self.weight, self.bias, *self.how)
        outputs = self.weight.shape[0] // x.shape[1]
        found = []
        for nth in range(outputs):
            bias = None if self.bias is None else self.bias[nth::outputs]
            found.append(F.conv2d(x, self.weight[nth::outputs], bias, *self.how).movedim(1, -1))
        return torch.stack(found, -1).flatten(-2).movedim(-1, 1)


class _RelativePosition(nn.Module):
    """`RelPosMlp`, whose gradient adds up what belongs to a relative position in a fixed order, without atomics.

    Also, its log coordinates are rounded correctly: timm takes the logarithm in float32, whose last bit differs between
    processors, and the network's output would follow it by 1e-8.
    """

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.mlp, self.heads = module.mlp, module.num_heads
        self.window = tuple(module.window_size)
        self.area = self.window[0] * self.window[1]
        for name, value in self._constants().items():
            kept = (
                value.to(module.rel_coords_log) if value.is_floating_point() else value.to(module.rel_coords_log.device)
            )
            self.register_buffer(name, kept, persistent=False)
        # A network made on the meta device gets its values by loading; these are in no state.
        self.register_load_state_dict_post_hook(_fill_again)

    def _constants(self) -> dict[str, Tensor]:
        """What follows from the window alone, on the CPU."""
        with torch.device("cpu"):
            axes = [torch.arange(1 - size, size, dtype=torch.float64) for size in self.window]
            logs = [axis.sign() * axis.abs().log1p() for axis in axes]
            coordinates = torch.stack(torch.meshgrid(*logs, indexing="ij"), -1).float()
            index = gen_relative_position_index(self.window).flatten()
            pairs = _pairs(index, len(axes[0]) * len(axes[1]))
        return {"rel_coords_log": coordinates, "relative_position_index": index, "pairs": pairs}

    def get_bias(self) -> Tensor:
        """``[1, heads, tokens, tokens]``: the name by which timm's attention asks."""
        table = self.mlp(cast(Tensor, self.rel_coords_log)).view(-1, self.heads).mT
        index = cast(Tensor, self.relative_position_index)
        # `torch.func` and forward-mode AD see through an index, not into an operator with a gradient of its own.
        bias = table[:, index] if transformed() else cast(Tensor, _Spread.apply(table, index, self.pairs))
        return bias.view(1, self.heads, self.area, self.area)

    def forward(self, scores: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        return scores + self.get_bias()


def _fill_again(module: nn.Module, _: Any) -> None:
    relative = cast(_RelativePosition, module)
    weight = relative.mlp.fc1.weight
    for name, value in relative._constants().items():
        own = cast(Tensor, getattr(relative, name))
        if own.is_meta:
            own = torch.empty_like(own, device=weight.device)
            setattr(relative, name, own)
        own.copy_(value)


def _pairs(index: Tensor, positions: int) -> Tensor:
    """``[positions, most]``: the places of each relative position in `index`, filled up with ``len(index)``."""
    counts = torch.bincount(index, minlength=positions)
    order = index.argsort(stable=True)
    nth = torch.arange(len(index)) - (counts.cumsum(0) - counts)[index[order]]
    pairs = index.new_full((positions, int(counts.max())), len(index))
    pairs[index[order], nth] = order
    return pairs


class _Spread(torch.autograd.Function):
    """``table[:, index]``."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, index: Tensor, pairs: Tensor) -> Tensor:
        ctx.save_for_backward(pairs)
        return table[:, index]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (pairs,) = ctx.saved_tensors
        return F.pad(grad, (0, 1))[:, pairs].sum(-1), None, None
