"""DS-GIM: double-similarity global internal enhancement (section 5)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .. import ops
from .layers import ConvBlock
from .projection import project


def decay(use: int) -> float:
    """``gamma`` of the i-th use (from 0) of DS-GIM in the third stage."""
    return math.exp(-(0.25 - 2 ** (-2.5 - 5 * use / 12)))


@torch.no_grad()
def similar_tokens(score: Tensor, grid: tuple[int, int], window: int) -> Tensor:
    """Mark the tokens of the half of the windows with the largest scores; ties go to the lower index.

    Args:
        score: ``[B, n_windows]``, windows in row-major order.
        grid: height and width in tokens.
        window: side of a window in tokens.

    Returns:
        ``[B, H * W]`` bool.
    """
    height, width = grid
    order = score.argsort(dim=1, descending=True, stable=True)
    chosen = order[:, : score.shape[1] // 2]
    similar = torch.zeros_like(score, dtype=torch.bool).scatter(1, chosen, True)
    similar = similar.view(-1, height // window, 1, width // window, 1)
    return similar.expand(-1, -1, window, -1, window).reshape(-1, height * width)


def branch_weights(similar: Tensor, gamma: float, variant: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The decay weights ``[B, N]`` of the query and of the key branch (section 5.2; section 9, row 1)."""
    if variant == "paper":
        decayed = torch.full_like(similar, gamma, dtype=dtype)
        return decayed.masked_fill(~similar, 1), decayed.masked_fill(similar, 1)
    first = torch.arange(similar.shape[0], device=similar.device).unsqueeze(1) == 0
    return (~similar & ~first).to(dtype), (similar & ~first).to(dtype)


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
        height, width = x.shape[-2:]
        score = ops.window_similarity(x, self.window, backend=self.backend)
        similar = similar_tokens(score, (height, width), self.window)
        query_weight, key_weight = branch_weights(similar, gamma, self.variant, x.dtype)
        tokens = x.flatten(2).transpose(1, 2)
        weights = [self.query.weight, self.key.weight, self.value.weight]
        (query, key, value), _ = project(tokens, weights, None)
        # A weight per token commutes with a product over channels: no weighted copies of x are made.
        query = query * query_weight.to(query.dtype).unsqueeze(-1) + self.query.bias.to(query.dtype)
        key = key * key_weight.to(key.dtype).unsqueeze(-1) + self.key.bias.to(key.dtype)
        value = value + self.value.bias.to(value.dtype)
        row_mean, threshold = ops.split_threshold(query, key, backend=self.backend)
        attended = ops.split_attention(
            query, key, value, row_mean, threshold, variant=self.variant, backend=self.backend
        )
        return self.refine(self.mix(attended).transpose(1, 2).reshape(x.shape))
