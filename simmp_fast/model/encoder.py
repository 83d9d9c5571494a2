"""Encoder B: DMW-LA blocks in four stages, DS-GIM after each block of the third (section 1)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..config import ModelConfig
from .dmwla import DMWLABlock
from .dsgim import DSGIM, decay
from .layers import ImageGate, PatchEmbedding, resize
from .memory import MemoryBank

DSGIM_STAGE = 2


def make_block(config: ModelConfig, channels: int, dim: int, clusters: int, name: str, backend: str) -> DMWLABlock:
    """A DMW-LA block with its bank; `name` seeds the bank's draws."""
    bank = MemoryBank(
        clusters,
        config.slots,
        dim,
        warmup_steps=config.warmup_steps,
        rate=config.update_rate,
        seed=config.memory_seed,
        name=name,
        backend=backend,
    )
    return DMWLABlock(channels, dim, bank, key_momentum=config.key_momentum, backend=backend)


class Stage(nn.Module):
    """Patch embedding, DMW-LA blocks, and the gate that lets the gated image in again.

    Args:
        config: the network's configuration.
        index: position of the stage, from 0.
        in_channels, channels: channels before and after the embedding.
        backend: operator backend.
    """

    def __init__(self, config: ModelConfig, index: int, in_channels: int, channels: int, backend: str) -> None:
        super().__init__()
        kernel, stride = (7, 4) if index == 0 else (3, 2)
        self.embed = PatchEmbedding(in_channels, channels, kernel, stride)
        dim, clusters = config.feature_dim, config.clusters
        self.blocks = nn.ModuleList(
            make_block(config, channels, dim, clusters, f"encoder.{index}.{i}", backend)
            for i in range(config.depths[index])
        )
        self.gate = ImageGate(channels)

    def forward(self, x: Tensor, image: Tensor, dsgim: DSGIM | None) -> Tensor:
        """Features of the stage before and the gated image to ``[B, C, h, w]``; `dsgim` follows each block."""
        x = self.embed(x)
        for use, block in enumerate(self.blocks):
            x = block(x)
            if dsgim is not None:
                x = dsgim(x, decay(use))
        return self.gate(x, image)


class MemoryEncoder(nn.Module):
    """Four stages of DMW-LA blocks on the gated image at S2; one DS-GIM serves every block of the third.

    Args:
        config: the network's configuration.
        channels: channels of the four stages, those of encoder A.
        backend: operator backend.
    """

    def __init__(self, config: ModelConfig, channels: Sequence[int], backend: str = "auto") -> None:
        super().__init__()
        self.size = config.dmwla_size
        inputs = (3, *channels[:-1])
        self.stages = nn.ModuleList(Stage(config, i, inputs[i], channels[i], backend) for i in range(4))
        self.dsgim = DSGIM(channels[DSGIM_STAGE], config.resolved_window(), variant=config.variant, backend=backend)

    def forward(self, image: Tensor) -> list[Tensor]:
        """Gated image ``[B, 3, S1, S1]`` to the four feature maps at ``S2 / 4, / 8, / 16, / 32``."""
        x = resize(image, (self.size, self.size))
        features = []
        for index, stage in enumerate(self.stages):
            x = stage(x, image, self.dsgim if index == DSGIM_STAGE else None)
            features.append(x)
        return features
