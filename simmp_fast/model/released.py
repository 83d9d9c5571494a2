"""Checkpoints of the authors' released code: their names and layouts, translated (section 10)."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import ConfigError, ModelConfig
from .weight_files import network_tensors, read_tensors

# Encoder A's stages are stored twice, beside a last norm that no forward pass reads; averaging adds a counter; `k` is
# read apart, and the flag `pool_structured` is never set by the code that saves it.
_IGNORED = re.compile(r"stem_1\.|encoder1_\d\.|backbone1\.(norm|head)\.|n_averaged$|(.*\.)?(k|pool_structured)$")
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
# A forward pass of the released code is warm-up while its block's counter is at most this.
_LAST_WARMUP_COUNT = 2000
_LARGEST_COUNT = 2.0**53
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
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
        weight = _matrix(f"{prefix}{leaf}", tensor)
        named = {f"{prefix}{_PROJECTIONS[leaf]}.weight": weight}
        if leaf == "phi":  # the momentum key was never saved
            named[f"{prefix}momentum_key"] = weight.clone()
        return named
    if leaf == "concept_pool":
        clusters = banks.get(prefix, 0)
        if clusters == 0 or tensor.shape[1] % clusters:
            raise ConfigError(
                f"released checkpoint: got {tensor.shape[1]} columns of concept_pool for {clusters} prototypes in the "
                f"block {prefix.removesuffix('.')}, expected a multiple"
            )
        return {f"{prefix}bank.memory": tensor.T.reshape(clusters, -1, tensor.shape[0]).contiguous()}
    if leaf == "concept_proto":
        return {f"{prefix}bank.prototypes": tensor.T.contiguous()}
    if leaf == "warmup_iter_counter":
        count = float(tensor)  # half precision holds no count above 65504: an infinite one is past the warm-up
        count = _LAST_WARMUP_COUNT + 1 if math.isinf(count) else math.ceil(max(-1.0, min(count, _LARGEST_COUNT)))
        return {f"{prefix}bank._extra_state": torch.tensor(count, dtype=torch.int64)}
    raise ConfigError(f"released checkpoint: got the tensor {leaf!r} in a DMW-LA block, expected none of that name")


def _read(source: str | os.PathLike[str] | Mapping[str, Any]) -> dict[str, Tensor]:
    """The named tensors of a checkpoint."""
    if isinstance(source, Mapping):
        return network_tensors(source, "released checkpoint")
    return read_tensors(Path(source))


def _check_axes(released: Mapping[str, Tensor]) -> None:
    """Refuse tensors that say how large the network is, or where it stands, in another form."""
    for name, tensor in released.items():
        leaf = "head" if name == "out_head1.weight" else name.rsplit(".", 1)[-1]
        axes = {"head": 4, "concept_pool": 2, "concept_proto": 2}.get(leaf, tensor.dim())
        single = leaf in ("k", "warmup_iter_counter")
        if tensor.dim() != axes or (single and tensor.numel() != 1):
            need = "one number" if single else f"{axes} axes"
            raise ConfigError(f"released checkpoint: {name}: got shape {list(tensor.shape)}, expected {need}")
        if single and bool(tensor.isnan()):
            raise ConfigError(f"released checkpoint: {name}: got {tensor.item()}, expected a count")


def _check_values(state: Mapping[str, Tensor]) -> None:
    """Refuse weights that are no finite floats; `state` is in this package's names."""
    for name, tensor in state.items():
        if name.endswith(("num_batches_tracked", "_extra_state")) or name.startswith("wld."):
            continue
        if tensor.dtype not in _FLOATS:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ConfigError(f"released checkpoint: {name}: got values of type {kind}, expected floats")
        if not bool(tensor.isfinite().all()):
            bad = int((~tensor.isfinite()).sum())
            raise ConfigError(f"released checkpoint: {name}: {bad} values are NaN or infinite, expected none")


def _matrix(name: str, tensor: Tensor) -> Tensor:
    """The weights of a 1x1 convolution as those of a linear layer."""
    if tensor.dim() < 2:
        raise ConfigError(f"released checkpoint: {name}: got shape {list(tensor.shape)}, expected two axes or more")
    return tensor.flatten(1)


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
        slots=pool.shape[1] // max(1, proto.shape[1]),
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
    _check_axes(released)
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
            state[own] = _matrix(own, tensor) if is_linear else tensor
    _check_values(state)
    _settle_phases(state, config)
    state.update(_update_width(released, config))
    return config, state


def _settle_phases(state: dict[str, Tensor], config: ModelConfig) -> None:
    """Phase and step of every bank, from the forward passes that its block has counted.

    The released code takes one step of warm-up after structuring, at count 2000. Here that step is the last one before
    structuring: a bank at that count has one step of warm-up to go.
    """
    for name in [name for name in state if name.endswith("bank._extra_state")]:
        count = state[name]
        structured = int(count) > _LAST_WARMUP_COUNT
        last = config.warmup_steps - 1
        state[name] = count.clamp_min(config.warmup_steps) if structured else count.clamp(0, last)
        state[name.replace("_extra_state", "structured")] = torch.tensor(float(structured))


def _update_width(released: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """W-LD's state: the update width of the encoder's first block, since the decoder's blocks keep the start value.

    The loss before it was never saved.
    """
    widths = [released[name] for name in sorted(released) if re.match(r"DMWLA_\d\.\d\.k$", name)]
    width = widths[0] if widths else torch.tensor(max(1, config.slots // 2))
    return {
        "wld.k": width.reshape(()).double().clamp(1, config.slots).to(torch.int64),
        "wld.previous": torch.tensor(0.0, dtype=torch.float64),
        "wld.seen": torch.tensor(0, dtype=torch.int64),
    }
