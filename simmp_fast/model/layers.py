"""The small parts that encoder, DS-GIM and decoder share (sections 1, 5 and 6)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..validation import transformed


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resize of ``[B, C, H, W]`` to `size`, ``align_corners=False``; `x` itself where nothing changes."""
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


def recomputed(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """``function(*inputs)``; what it would keep for its backward is computed again there. It must draw no numbers.

    For what is cheap to compute and large to keep. Products whose result nobody needs are not repeated. Compiled code
    decides by itself what it keeps, and `torch.func` allows for no recomputation.
    """
    if torch.compiler.is_compiling() or transformed() or not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


class ImageGate(nn.Module):
    """``f + sigmoid(f) * conv1x1(resize(image))``: the input image let back into a feature map.

    Args:
        channels: channels of the feature map.
        image_channels: channels of the image.
    """

    def __init__(self, channels: int, image_channels: int = 3) -> None:
        super().__init__()
        self.project = nn.Conv2d(image_channels, channels, 1)

    def forward(self, features: Tensor, image: Tensor) -> Tensor:
        """Features ``[B, C, h, w]`` and image ``[B, 3, H, W]`` to ``[B, C, h, w]``."""
        return features + recomputed(self._let_in, features.sigmoid(), image)

    def _let_in(self, share: Tensor, image: Tensor) -> Tensor:
        height, width = share.shape[-2:]
        return share * self.project(resize(image, (height, width)))


def conv_norm_relu(in_channels: int, out_channels: int) -> list[nn.Module]:
    """A 3x3 convolution, batch norm and ReLU."""
    return [
        nn.Conv2d(in_channels, out_channels, 3, padding=1),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    ]


class ConvBlock(nn.Sequential):
    """Twice a 3x3 convolution, batch norm and ReLU; `hidden` channels between the two."""

    def __init__(self, channels: int, hidden: int | None = None) -> None:
        hidden = channels if hidden is None else hidden
        super().__init__(*conv_norm_relu(channels, hidden), *conv_norm_relu(hidden, channels))


class UpBlock(nn.Sequential):
    """Nearest upsampling by 2, then a 3x3 convolution, batch norm and ReLU."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(nn.Upsample(scale_factor=2), *conv_norm_relu(in_channels, out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, h, w]`` to ``[B, C', 2h, 2w]``."""
        resized, convolve, norm, relu = self
        return relu(norm(recomputed(lambda x: convolve(resized(x)), x)))


class ChannelAttention(nn.Module):
    """Sigmoid of a shared two-layer projection of the global mean and the global maximum (section 6, CA)."""

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        hidden = max(1, channels // reduction)
        self.squeeze = nn.Conv2d(channels, hidden, 1, bias=False)
        self.expand = nn.Conv2d(hidden, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to weights ``[B, C, 1, 1]``."""
        mean, peak = F.adaptive_avg_pool2d(x, 1), F.adaptive_max_pool2d(x, 1)
        return (self.expand(self.squeeze(mean).relu()) + self.expand(self.squeeze(peak).relu())).sigmoid()


class SpatialAttention(nn.Module):
    """Sigmoid of a 7x7 convolution over the channel mean and the channel maximum (section 6, SA)."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(2, 1, 7, padding=3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to weights ``[B, 1, H, W]``."""
        return self.mix(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)).sigmoid()


class PatchEmbedding(nn.Module):
    """An overlapping strided convolution, then LayerNorm over channels (section 1, encoder B)."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.project = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2)
        self.norm = nn.LayerNorm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to ``[B, C', H / stride, W / stride]``."""
        return self.norm(self.project(x).movedim(1, -1)).movedim(-1, 1)
