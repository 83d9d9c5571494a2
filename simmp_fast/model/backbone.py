"""Encoder A: a timm MaxViT or CoAtNet whose stages see the image again (section 1)."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..config import ConfigError
from ..validation import transformed
from .layers import ImageGate, resize
from .weight_files import read_tensors


class GatedBackbone(nn.Module):
    """Stem and four stages of a timm MaxViT; after each stage the input image is let back in through a gate.

    Args:
        name: a timm model of the MaxViT/CoAtNet family.
        image_size: side of the square input in pixels [S1].

    Attributes:
        channels: channels of the four feature maps, at strides 4, 8, 16 and 32.

    Raises:
        ConfigError: no such timm model, another family, or an image size the model cannot be built for.
    """

    def __init__(self, name: str, image_size: int) -> None:
        super().__init__()
        self.image_size = image_size
        network = _create(name, image_size)
        self.stem: nn.Module = network.stem
        self.stages: nn.Sequential = network.stages
        self.channels = tuple(int(info["num_chs"]) for info in network.feature_info[-4:])
        self.gates = nn.ModuleList(ImageGate(c) for c in self.channels)
        self.attention = nn.Conv2d(self.channels[-1], 1, 1)

    def forward(self, image: Tensor) -> tuple[list[Tensor], Tensor]:
        """Encode an image.

        Args:
            image: ``[B, 3, H, W]``.

        Returns:
            the four feature maps ``[B, C_i, S1 / 2^(i+1), ..]``, and the gated image ``[B, 3, S1, S1]`` for encoder B.
        """
        size = (self.image_size, self.image_size)
        image = resize(image, size)
        x = self.stem(image)
        features = []
        with sdpa_kernel(SDPBackend.MATH) if transformed() else nullcontext():  # torch.func follows no fused attention
            for stage, gate in zip(self.stages, self.gates, strict=True):
                x = gate(stage(x), image)
                features.append(x)
        return features, image * resize(self.attention(x).sigmoid(), size)

    def load_weights(self, source: str) -> None:
        """Load stem and stages from a local file, or from timm's download where `source` is ``timm:<model name>``.

        Args:
            source: path of a safetensors file or of a checkpoint, with timm's names (`weight_files.read_tensors`).

        Raises:
            ConfigError: no such file or download, or names, shapes or kinds of numbers that do not fit.
        """
        try:
            if source.startswith("timm:"):
                state = _downloaded(source.removeprefix("timm:"), self.image_size)
            else:
                state = read_tensors(Path(source))
        except ConfigError as error:
            raise ConfigError(f"train.backbone_weights: {error}") from error
        own = {k: v for k, v in self.state_dict().items() if k.startswith(("stem.", "stages."))}
        missing = [k for k in own if k not in state or not _alike(own[k], state[k])]
        if missing:
            raise ConfigError(
                f"train.backbone_weights: {source} lacks {len(missing)} of the backbone's {len(own)} tensors, or has "
                f"them in another shape or kind, the first being {missing[0]}; expected weights of the same timm model"
            )
        self.load_state_dict({k: state[k] for k in own}, strict=False)


def _alike(own: Tensor, other: Tensor) -> bool:
    return own.shape == other.shape and own.is_floating_point() == other.is_floating_point()


def _downloaded(name: str, image_size: int) -> dict[str, Tensor]:
    """The weights that timm has for its model `name`."""
    import timm

    try:
        return timm.create_model(name, pretrained=True, img_size=image_size, num_classes=0).state_dict()
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"got timm's weights of {name!r}, which cannot be had ({reason}); name a file") from error


def _create(name: str, image_size: int) -> Any:
    """The timm model `name`, checked to be of the right family."""
    import timm
    from timm.models.maxxvit import MaxxVit

    from .lean import make_lean

    try:
        network = timm.create_model(name, pretrained=False, img_size=image_size, num_classes=0)
    except Exception as error:  # timm raises RuntimeError, TypeError or AssertionError for names and sizes alike
        raise ConfigError(
            f"model.backbone: got {name!r} at image size {image_size}, which timm cannot build ({error}); expected a "
            "MaxViT or CoAtNet model of timm, such as 'maxxvit_rmlp_small_rw_256', and an image size that is a "
            "multiple of 32"
        ) from error
    if not isinstance(network, MaxxVit) or len(network.stages) != 4:
        raise ConfigError(f"model.backbone: got {name!r}, expected a MaxViT or CoAtNet model of timm with four stages")
    make_lean(network)
    return network
