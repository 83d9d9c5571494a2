"""Encoder A: a timm MaxViT or CoAtNet whose stages see the image again (section 1)."""

from __future__ import annotations

import re
from contextlib import nullcontext
from pathlib import Path
from ssl import SSLError
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..config import ConfigError
from ..messages import one_line, shown
from ..validation import transformed
from .layers import ImageGate, resize
from .weight_files import read_tensors

_HUB_FILES = ("model.safetensors", "pytorch_model.bin")
_PATIENCE = 5.0  # seconds


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
            ConfigError: no such file or download, names, shapes or kinds of numbers that do not fit, or values that
                are not finite.
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
        wrong = [k for k in own if not bool(state[k].float().isfinite().all())]  # in float32, as they are used
        if wrong:
            raise ConfigError(
                f"train.backbone_weights: {source}: {wrong[0]}: got values that are not finite, expected numbers "
                f"({len(wrong)} of {len(own)} tensors have some)"
            )
        self.load_state_dict({k: state[k] for k in own}, strict=False)


def _alike(own: Tensor, other: Tensor) -> bool:
    return own.shape == other.shape and own.is_floating_point() == other.is_floating_point()


def _downloaded(name: str, image_size: int) -> dict[str, Tensor]:
    """The weights that timm has for its model `name`."""
    import timm

    _require_hub(name)
    try:
        return timm.create_model(name, pretrained=True, img_size=image_size, num_classes=0).state_dict()
    except Exception as error:  # the errors of timm, of its clients and of PyTorch's reader have nothing in common
        raise _not_had(name, str(error) or type(error).__name__) from error


def _not_had(name: str, reason: str) -> ConfigError:
    return ConfigError(
        f"got timm's weights of {name!r}, which cannot be had ({one_line(reason.splitlines()[0])}); download them "
        "elsewhere and name the file, or train without"
    )


def _require_hub(name: str) -> None:
    """Where timm's weights are on the Hub alone, ask once whether it can be reached: its client asks for a minute."""
    import timm
    from huggingface_hub import constants, try_to_load_from_cache

    pretrained = timm.get_pretrained_cfg(name)
    repository = pretrained.hf_hub_id if pretrained is not None else None
    cached = (try_to_load_from_cache(str(repository), file) for file in _HUB_FILES)
    if not repository or constants.HF_HUB_OFFLINE or any(isinstance(path, str) for path in cached):
        return
    try:
        with urlopen(Request(constants.ENDPOINT, method="HEAD"), timeout=_PATIENCE):
            pass
    except HTTPError:  # an answer
        pass
    except OSError as error:
        reason = getattr(error, "reason", error)
        if not isinstance(reason, SSLError):  # its client has certificates of its own
            raise _not_had(name, f"{constants.ENDPOINT} cannot be reached: {reason}") from error


def _create(name: str, image_size: int) -> Any:
    """The timm model `name`, checked to be of the right family."""
    import timm
    from timm.models.maxxvit import MaxxVit

    from .lean import make_lean

    if not re.fullmatch(r"[\w.]+", name):  # timm would look for hf-hub:.. and local-dir:.. elsewhere
        raise ConfigError(f"model.backbone: got {shown(name)}, expected the name of a MaxViT or CoAtNet model of timm")
    try:
        network = timm.create_model(name, pretrained=False, img_size=image_size, num_classes=0)
    except Exception as error:  # timm raises RuntimeError, TypeError or AssertionError for names and sizes alike
        raise ConfigError(
            f"model.backbone: got {shown(name)} at image size {image_size}, which timm cannot build "
            f"({one_line(str(error))}); expected a MaxViT or CoAtNet model of timm, such as "
            "'maxxvit_rmlp_small_rw_256', and an image size that is a multiple of 32"
        ) from error
    if not isinstance(network, MaxxVit) or len(network.stages) != 4:
        raise ConfigError(f"model.backbone: got {name!r}, expected a MaxViT or CoAtNet model of timm with four stages")
    make_lean(network)
    return network
