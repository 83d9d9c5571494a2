"""The decoder: from the deepest sum of both encoders back to stride 4 (section 6)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..config import ModelConfig
from .encoder import make_block
from .layers import ChannelAttention, ConvBlock, SpatialAttention, UpBlock, recomputed


class DecoderLevel(nn.Module):
    """Upsample, merge the skip under channel and spatial attention, attend, convolve.

    Args:
        config: the network's configuration.
        deeper: channels of the level below.
        channels: channels of this level and its skip.
        name: name of the level, which seeds its bank's draws.
        backend: operator backend.
    """

    def __init__(self, config: ModelConfig, deeper: int, channels: int, name: str, backend: str) -> None:
        super().__init__()
        self.up = UpBlock(deeper, channels)
        self.channel_attention = ChannelAttention(channels)
        self.attend = make_block(config, channels, config.decoder_feature_dim, config.decoder_clusters, name, backend)
        self.block = ConvBlock(channels)

    def forward(self, x: Tensor, skips: list[Tensor], spatial_attention: nn.Module) -> Tensor:
        """``[B, C', h, w]`` and the last of the skips, which it takes off their list, ``[B, C, 2h, 2w]``."""
        return self.block(self.attend(self._merge(x, skips, spatial_attention)))

    def _merge(self, x: Tensor, skips: list[Tensor], spatial_attention: nn.Module) -> Tensor:
        up = self.up(x)
        merged = up + skips.pop()
        weighted = recomputed(torch.mul, self.channel_attention(merged), merged)
        return up + spatial_attention(weighted) * weighted


class Decoder(nn.Module):
    """Four levels, deepest first; one spatial attention serves the upper three.

    Args:
        config: the network's configuration.
        channels: channels of the four skips, finest first.
        backend: operator backend.
    """

    def __init__(self, config: ModelConfig, channels: Sequence[int], backend: str = "auto") -> None:
        super().__init__()
        deepest = channels[-1]
        self.enter = nn.Conv2d(deepest, deepest, 1)
        self.attend = make_block(
            config, deepest, config.decoder_feature_dim, config.decoder_clusters, "decoder.4", backend
        )
        self.block = ConvBlock(deepest)
        # Never read: the published parameter count includes it, and released checkpoints bring it along. It asks for no
        # gradient, since data parallel training waits for every gradient that is asked for.
        self.channel_attention = ChannelAttention(deepest).requires_grad_(False)
        self.spatial_attention = SpatialAttention()
        self.levels = nn.ModuleList(
            DecoderLevel(config, channels[i + 1], channels[i], f"decoder.{i + 1}", backend) for i in (2, 1, 0)
        )

    def forward(self, skips: list[Tensor]) -> list[Tensor]:
        """Skips ``s_1 .. s_4``, finest first, to ``[d_4, d_3, d_2, d_1]``, coarsest first.

        The list of skips is emptied: none is held longer than it is needed.
        """
        x = self.block(self.attend(self.enter(skips.pop())))
        outputs = [x]
        for level in self.levels:
            x = level(x, skips, self.spatial_attention)
            outputs.append(x)
        return outputs
