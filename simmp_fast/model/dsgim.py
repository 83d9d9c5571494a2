"""DS-GIM: double-similarity global internal enhancement (section 5)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..validation import product_dtype
from .layers import ConvBlock


def decay(use: int) -> float:
    """``gamma`` of the i-th use (from 0) of DS-GIM in the third stage."""
    return math.exp(-(0.25 - 2 ** (-2.5 - 5 * use / 12)))


class DSGIM(nn.Module):
    """Attention split by cosine windows and Euclidean row means, then a convolution block; no residual.

    Args:
        channels: channels of the feature map [C].
        window: side of a window in tokens.
        variant: "paper" or "released".
        backend: operator backend.
    """

    def __init__(self, channels: int, window: int, *, variant: str = "paper", backend: str = "auto") -> None:
        super().__init__()
        self.query = nn.Linear(channels, channels)
        self.key = nn.Linear(channels, channels)
        self.value = nn.Linear(channels, channels)
        self.mix = nn.Linear(channels, channels)
        self.refine = ConvBlock(channels, max(1, channels // 4))
        self.window, self.variant, self.backend = window, variant, backend

    def forward(self, x: Tensor, gamma: float) -> Tensor:
        """``[B, C, H, W]`` and the decay of this use to ``[B, C, H, W]``."""
        dtype, sizes = product_dtype(x), [3 * x.shape[1], x.shape[1]]
        layers = (self.query, self.key, self.value, self.mix)
        weight, mix_weight = torch.cat([layer.weight for layer in layers]).to(dtype).split(sizes)
        bias, mix_bias = torch.cat([layer.bias for layer in layers]).to(dtype).split(sizes)
        score = ops.window_similarity(x, self.window, backend=self.backend)
        decayed = ops.decay_weights(
            score, (x.shape[2], x.shape[3]), self.window, gamma, self.variant, dtype, backend=self.backend
        )
        tokens = x.flatten(2).transpose(1, 2).to(dtype, memory_format=torch.contiguous_format)
        product = F.linear(tokens, weight).unflatten(-1, (3, -1))
        # A weight per token commutes with a product over channels: no weighted copies of x are made.
        query, key, value = torch.addcmul(bias.unflatten(0, (3, -1)), product, decayed.unsqueeze(-1)).unbind(2)
        row_mean, threshold = ops.split_threshold(query, key, backend=self.backend)
        attended = ops.split_attention(
            query, key, value, row_mean, threshold, variant=self.variant, backend=self.backend
        )
        mixed = F.linear(attended.to(dtype), mix_weight, mix_bias)
        return self.refine(mixed.transpose(1, 2).reshape(x.shape))
