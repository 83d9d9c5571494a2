"""Sim-MPNet: both encoders, skip sums, decoder and heads (section 1)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from ..config import BACKENDS, ModelConfig
from ..validation import check_choice, check_floating, check_shape
from . import pretrained
from .backbone import GatedBackbone
from .decoder import Decoder
from .dmwla import DMWLABlock
from .dsgim import DSGIM
from .encoder import MemoryEncoder
from .layers import resize
from .memory import MemoryBank
from .wld import UpdateWidth


class SimMPNet(nn.Module, PyTorchModelHubMixin):
    """The segmentation network.

    A training step is: forward, loss, ``backward()``, `commit_memory`, optimiser step; in the epoch the recipe names
    also ``wld.remember(loss)``, and from the next one on ``wld.step(loss)``. Evaluation changes no state.

    Args:
        config: what the network is; the `synapse` preset by default.
        backend: operator backend: "auto", "reference", "portable" or "triton".

    Attributes:
        config: the configuration.
        wld: the width of the memory update, one for all blocks.
        channels: channels at strides 4, 8, 16 and 32.

    Raises:
        ConfigError: a configuration that no network fits.
        ValueError: no such backend.
    """

    def __init__(self, config: ModelConfig | None = None, backend: str = "auto") -> None:
        super().__init__()
        check_choice("backend", backend, BACKENDS)
        config = ModelConfig() if config is None else config
        self.config = config
        self.adapter: nn.Module = nn.Identity()
        if config.in_channels != 3:
            self.adapter = nn.Sequential(nn.Conv2d(config.in_channels, 3, 1), nn.BatchNorm2d(3), nn.ReLU(inplace=True))
        self.backbone = GatedBackbone(config.backbone, config.image_size)
        self.channels = self.backbone.channels
        self.encoder = MemoryEncoder(config, self.channels, backend)
        self.decoder = Decoder(config, self.channels, backend)
        self.heads = nn.ModuleList(nn.Conv2d(c, config.classes, 1) for c in reversed(self.channels))
        self.wld = UpdateWidth(config.slots)

    def forward(self, image: Tensor, *, native_heads: bool = False) -> list[Tensor]:
        """Logits of the four heads, coarsest first.

        Args:
            image: ``[B, in_channels, H, W]``, floating, any size; it is resized to S1.
            native_heads: return the heads at their own resolution, ``S2 / 32`` to ``S2 / 4``, for `powerset_loss`,
                which resizes them itself.

        Returns:
            four tensors ``[B, classes, S1, S1]``, or ``[B, classes, S2 / s, S2 / s]`` at their own resolution.

        Raises:
            TypeError, ValueError: an image of another shape or dtype, or nothing at all.
        """
        check_shape("image", image, "B C H W", C=self.config.in_channels)
        check_floating("image", image)
        if 0 in image.shape:
            raise ValueError(f"image: got shape {list(image.shape)}, expected at least one image of at least one pixel")
        decoded = self.decoder(self._skips(image))
        heads = [head(d) for head, d in zip(self.heads, decoded, strict=True)]
        if native_heads:
            return heads
        size = (self.config.image_size, self.config.image_size)
        return [resize(head, size) for head in heads]

    def _skips(self, image: Tensor) -> list[Tensor]:
        """The sums of both encoders' features, finest first; a method, so that nothing else outlives it."""
        features, gated = self.backbone(self.adapter(image))
        encoded = self.encoder(gated)
        return [e + resize(f, (e.shape[-2], e.shape[-1])) for e, f in zip(encoded, features, strict=True)]

    @torch.no_grad()
    def segment(self, image: Tensor) -> Tensor:
        """The class of every pixel: ``[B, in_channels, H, W]`` to ``[B, S1, S1]`` int64. Call it in evaluation mode."""
        return torch.stack(self(image)).sum(0).argmax(1)

    def memory_blocks(self) -> Iterator[DMWLABlock]:
        """All DMW-LA blocks, those of the encoder first."""
        return (module for module in self.modules() if isinstance(module, DMWLABlock))

    def commit_memory(self, keep: Tensor | None = None) -> None:
        """Write the last training forward into every memory bank; call it after that forward's backward.

        Args:
            keep: 0-d bool tensor on the device; where false, banks and momentum keys keep their values.

        Raises:
            RuntimeError: no training forward came before.
        """
        self.prepare_memory()
        self.write_memory(keep)
        self.advance_memory()

    def prepare_memory(self, batch: int | None = None) -> None:
        """The first part of `commit_memory`, on the host: draw what the warm-up writes next.

        Args:
            batch: images of the step, to draw before its forward pass; otherwise those of the forward pass before.
        """
        for block in self.memory_blocks():
            block.bank.prepare(batch)

    def write_memory(self, keep: Tensor | None = None) -> None:
        """The second part of `commit_memory`: all that runs on the device; it can be compiled and captured."""
        for block in self.memory_blocks():
            block.write_memory(self.wld.k, keep)

    def advance_memory(self) -> None:
        """The last part of `commit_memory`, on the host: count the step; at the end of the warm-up, structure."""
        for block in self.memory_blocks():
            block.bank.advance()

    def discard_memory(self) -> None:
        """Forget what the last training forward offered, where no backward follows it."""
        for block in self.memory_blocks():
            block.bank.discard()

    @property
    def memory_step(self) -> int:
        """Training steps committed so far, by the bank that has the fewest."""
        return min(block.bank.step for block in self.memory_blocks())

    @property
    def memory_phase(self) -> str:
        """``"warmup"`` while some bank is being filled, ``"structured"`` from then on."""
        return "warmup" if any(block.bank.warming for block in self.memory_blocks()) else "structured"

    @property
    def backend(self) -> str:
        """The operator backend of every block; assign to change it."""
        return next(self.memory_blocks()).backend

    @backend.setter
    def backend(self, name: str) -> None:
        check_choice("backend", name, BACKENDS)
        for module in self.modules():
            if isinstance(module, (DMWLABlock, MemoryBank, DSGIM)):
                module.backend = name

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Freeze or thaw all parameters; the gate that nothing reads never asks for a gradient."""
        super().requires_grad_(requires_grad)
        self.decoder.channel_attention.requires_grad_(False)
        return self

    def parameter_count(self) -> int:
        """Parameters, frozen ones too; the backbone's classifier is not among them, memory banks are buffers."""
        return sum(p.numel() for p in self.parameters())

    @classmethod
    def from_released(
        cls,
        source: str | os.PathLike[str] | Mapping[str, Tensor],
        variant: str = "released",
        *,
        in_channels: int = 1,
        backend: str = "auto",
    ) -> Self:
        """A network, in evaluation mode, with the weights of a checkpoint of the authors' released code.

        Sizes are read off the tensors; the working sizes are the released 256 and 224.

        Args:
            source: path of the checkpoint (read with ``weights_only=True``), or what it holds.
            variant: "released" computes what the released code computes; "paper" what the paper defines.
            in_channels: 1 or 3; the released network takes both.
            backend: operator backend.

        Raises:
            ConfigError: a file that cannot be read, or tensors that are missing, unknown or of another shape.
        """
        from .released import read_released

        config, state = read_released(source, variant, in_channels)
        model = cls(config, backend)
        pretrained.load_strict(model, state, "released checkpoint")
        return model.eval()

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | os.PathLike[str], *, backend: str = "auto", **download: Any
    ) -> Self:
        """A network saved by `save_pretrained`, in evaluation mode, from a folder or from the Hugging Face Hub.

        Args:
            pretrained_model_name_or_path: a folder, or the name of a repository on the Hub.
            backend: operator backend.
            download: `revision`, `token`, `cache_dir`, `force_download` or `local_files_only` of ``hf_hub_download``.

        Raises:
            ConfigError: no such folder or repository, a file is missing or damaged, or its tensors do not fit its
                configuration.
        """
        config, state = pretrained.read(pretrained_model_name_or_path, download)
        model = cls(config, backend)
        pretrained.load_strict(model, state, str(pretrained_model_name_or_path))
        return model.eval()

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike[str],
        *,
        config: object = None,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        model_card_kwargs: dict[str, Any] | None = None,
        **push_options: Any,
    ) -> str | None:
        """Save configuration, weights and a model card in a folder, and push them to the Hugging Face Hub if asked.

        Args:
            save_directory: made if it is missing; other files in it stay, and so does a model card.
            config: taken for the Hub's interface and not read: the network has its own.
            repo_id: name of the repository on the Hub; that of the folder where it is None.
            push_to_hub: whether to push.
            model_card_kwargs: what the model card says.
            push_options: of `push_to_hub`.

        Returns:
            The address of the commit on the Hub; None where nothing was pushed.

        Raises:
            ConfigError: the folder cannot be written; it is as it was before.
        """
        folder = Path(save_directory)
        with pretrained.staged(folder) as stage:
            super().save_pretrained(stage, model_card_kwargs=model_card_kwargs)
        if not push_to_hub:
            return None
        return self.push_to_hub(repo_id or folder.name, model_card_kwargs=model_card_kwargs, **push_options)

    def _save_pretrained(self, save_directory: Path) -> None:
        pretrained.write(save_directory, self.config, self.state_dict())
