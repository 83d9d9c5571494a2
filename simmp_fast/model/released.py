"""Checkpoints of the authors' released code: their names and layouts, translated (section 10)."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..config import ConfigError, ModelConfig

# Encoder A's stages are stored twice, beside a last norm that no forward pass reads; `k` and the flag are read apart.
_IGNORED = re.compile(r"stem_1\.|encoder1_\d\.|backbone1\.(norm|head)\.|(.*\.)?(k|pool_structured)$")
_RENAMES: tuple[tuple[str, str], ...] = (
    (r"conv\.(\d)\.", r"adapter.\1."),
    (r"backbone1\.", "backbone."),
    (r"out_head1_(\d)_in\.", r"backbone.gates.{\1-1}.project."),
    (r"out_head4_in\.", "backbone.attention."),
    (r"patch_embed(\d)\.proj\.", r"encoder.stages.{\1-1}.embed.project."),
    (r"patch_embed(\d)\.norm\.", r"encoder.stages.{\1-1}.embed.norm."),
    (r"DMWLA_(\d)\.(\d)\.", r"encoder.stages.{\1-1}.blocks.\2."),
    (r"DSGIM\.ConvBlock\.conv\.", "encoder.dsgim.refine."),
    (r"DSGIM\.fc\.", "encoder.dsgim.mix."),
    (r"DSGIM\.", "encoder.dsgim."),
    (r"out_head2_(\d)_in\.", r"encoder.stages.{\1-1}.gate.project."),
    (r"decoder\.Conv_1x1\.", "decoder.enter."),
    (r"decoder\.DMWLA_4\.", "decoder.attend."),
    (r"decoder\.ConvBlock4\.conv\.", "decoder.block."),
    (r"decoder\.SA\.conv1\.", "decoder.spatial_attention.mix."),
    (r"decoder\.DMWLA_(\d)\.", r"decoder.levels.{3-\1}.attend."),
    (r"decoder\.ConvBlock(\d)\.conv\.", r"decoder.levels.{3-\1}.block."),
    (r"decoder\.Up(\d)\.up\.", r"decoder.levels.{3-\1}.up."),
    (r"decoder\.CA4\.fc1\.", "decoder.channel_attention.squeeze."),
    (r"decoder\.CA4\.fc2\.", "decoder.channel_attention.expand."),
    (r"decoder\.CA(\d)\.fc1\.", r"decoder.levels.{3-\1}.channel_attention.squeeze."),
    (r"decoder\.CA(\d)\.fc2\.", r"decoder.levels.{3-\1}.channel_attention.expand."),
    (r"out_head(\d)\.", r"heads.{\1-1}."),
)
_PROJECTIONS = {"theta": "query", "phi": "key", "g": "value", "o": "output"}
_BLOCK = re.compile(r"(?P<block>.*DMWLA_\d(\.\d)?)\.(?P<leaf>[a-z_]+)(\.weight)?$")


def _translate(name: str) -> str:
    """The network's own name of a released tensor; index arithmetic in braces is carried out."""
    for pattern, target in _RENAMES:
        match = re.match(pattern, name)
        if match:
            renamed = match.expand(target) + name[match.end() :]
            return re.sub(r"\{(\d)-(\d)\}", lambda m: str(int(m[1]) - int(m[2])), renamed)
    raise ConfigError(f"released checkpoint: got the tensor {name!r}, which the released network does not have")


def _block_tensor(prefix: str, leaf: str, tensor: Tensor, banks: Mapping[str, int]) -> dict[str, Tensor]:
    """One tensor of a DMW-LA block; `prefix` is the block's own name here."""
    if leaf in _PROJECTIONS:
        weight = tensor.flatten(1)
        named = {f"{prefix}{_PROJECTIONS[leaf]}.weight": weight}
        if leaf == "phi":  # the momentum key was never saved
            named[f"{prefix}momentum_key"] = weight.clone()
        return named
    if leaf == "concept_pool":
        clusters = banks[prefix]
        return {f"{prefix}bank.memory": tensor.T.reshape(clusters, -1, tensor.shape[0]).contiguous()}
    if leaf == "concept_proto":
        return {f"{prefix}bank.prototypes": tensor.T.contiguous()}
    if leaf == "warmup_iter_counter":
        return {f"{prefix}bank._extra_state": tensor.reshape(()).to(torch.int64)}
    raise ConfigError(f"released checkpoint: got the tensor {leaf!r} in a DMW-LA block, expected none of that name")


def _read(source: str | os.PathLike[str] | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a checkpoint, without the prefix that data parallel training adds."""
    if isinstance(source, Mapping):
        content: Any = source
    else:
        if not os.path.isfile(source):
            raise ConfigError(f"{source}: no such file; expected a released checkpoint")
        try:
            content = torch.load(source, map_location="cpu", weights_only=True)
        except Exception as error:
            raise ConfigError(f"{source}: cannot be read as a checkpoint of tensors alone: {error}") from error
        for key in ("state_dict", "model"):
            content = content.get(key, content) if isinstance(content, Mapping) else content
        if not isinstance(content, Mapping) or not all(isinstance(v, Tensor) for v in content.values()):
            raise ConfigError(f"{source}: got a file without a state dict, expected names and tensors")
    return {name.removeprefix("module."): tensor for name, tensor in content.items()}


def _config(released: Mapping[str, Tensor], variant: str, in_channels: int) -> ModelConfig:
    """The configuration that a released checkpoint's shapes imply."""
    names = ("out_head1.weight", "DMWLA_1.0.concept_proto", "DMWLA_1.0.concept_pool", "decoder.DMWLA_1.concept_proto")
    for name in names:
        if name not in released:
            raise ConfigError(f"released checkpoint: the tensor {name!r} is missing, expected the released 1,317 names")
    head, proto, pool, decoder_proto = (released[name] for name in names)
    return ModelConfig(
        classes=head.shape[0],
        in_channels=in_channels,
        clusters=proto.shape[1],
        feature_dim=proto.shape[0],
        slots=pool.shape[1] // proto.shape[1],
        decoder_clusters=decoder_proto.shape[1],
        decoder_feature_dim=decoder_proto.shape[0],
        variant=variant,
    )


def read_released(
    source: str | os.PathLike[str] | Mapping[str, Tensor], variant: str, in_channels: int
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Configuration and state dict, in this package's names, of a released checkpoint.

    Args:
        source: path or state dict.
        variant: "released" or "paper".
        in_channels: 1 or 3.

    Raises:
        ConfigError: a file that cannot be read, or tensors of another network.
    """
    if in_channels not in (1, 3):
        raise ConfigError(f"in_channels: got {in_channels}, expected 1 or 3, which the released network takes")
    released = _read(source)
    config = _config(released, variant, in_channels)
    banks = {
        _translate(name).removesuffix("concept_proto"): tensor.shape[1]
        for name, tensor in released.items()
        if name.endswith(".concept_proto")
    }
    state: dict[str, Tensor] = {}
    for name, tensor in released.items():
        if _IGNORED.match(name) or (in_channels == 3 and name.startswith("conv.")):
            continue
        block = _BLOCK.match(name)
        if block:
            prefix = _translate(f"{block['block']}.")
            state.update(_block_tensor(prefix, block["leaf"], tensor, banks))
        else:
            own = _translate(name)
            is_linear = re.match(r"encoder\.dsgim\.(query|key|value)\.weight$", own)
            state[own] = tensor.flatten(1) if is_linear else tensor
    _settle_steps(released, state, config)
    state.update(_update_width(released, config))
    return config, state


def _settle_steps(released: Mapping[str, Tensor], state: dict[str, Tensor], config: ModelConfig) -> None:
    """Step counters on this package's scale: a structured bank is past warm-up, another one still in it."""
    structured = any(bool(t.reshape(-1)[0]) for n, t in released.items() if n.endswith("pool_structured"))
    for name, tensor in state.items():
        if name.endswith("bank._extra_state"):
            last = config.warmup_steps - 1
            state[name] = tensor.clamp_min(config.warmup_steps) if structured else tensor.clamp_max(last)


def _update_width(released: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """W-LD's state: the encoder's update width; the loss before it was never saved."""
    start = max(1, config.slots // 2)
    width = released.get("DMWLA_1.0.k", torch.tensor(start)).reshape(()).to(torch.int64)
    return {
        "wld.k": width.clamp(1, config.slots),
        "wld.previous": torch.tensor(0.0, dtype=torch.float64),
        "wld.seen": torch.tensor(False),
    }
