"""How large the numbers of a configuration may be, and why: checked before any memory is taken."""

from __future__ import annotations

import math
from collections.abc import Mapping

from simmp_fast.documents import ConfigError
from simmp_fast.messages import shown

MAX_IMAGE_SIZE = 2048
MAX_MEMORY = 64 * 2**30  # bytes of what a configuration alone asks for

# The largest value of each key, and why. All are far beyond sensible use: a typing error ends in a sentence, and not in
# a machine without memory.
MODEL_LIMITS: dict[str, tuple[float, str]] = {
    "classes": (256, "a label is one byte"),
    "in_channels": (1024, "images have few channels"),
    "image_size": (MAX_IMAGE_SIZE, "attention in the backbone needs memory as its fourth power"),
    "dmwla_size": (MAX_IMAGE_SIZE, "attention among all tokens takes time as its fourth power"),
    "clusters": (4096, "every token is compared with every cluster"),
    "decoder_clusters": (4096, "every token is compared with every cluster"),
    "feature_dim": (8192, "projections grow with it"),
    "decoder_feature_dim": (8192, "projections grow with it"),
    "slots": (100_000, "every token attends to all slots of its cluster"),
    "warmup_steps": (10**9, "no training is longer"),
}
TRAIN_LIMITS: dict[str, tuple[float, str]] = {
    "epochs": (10**6, "no training is longer"),
    "batch_size": (65_536, "a batch lies in memory"),
    "lr": (1000, "weights are far below it"),
    "weight_decay": (1000, "weights would vanish in one step"),
    "ce_weight": (10**6, "losses are summed in float32"),
    "dice_weight": (10**6, "losses are summed in float32"),
    "validate_from": (10**9, "no training is longer"),
    "validate_every": (10**9, "no training is longer"),
    "keep_every": (10**9, "no training is longer"),
    "wld_from": (10**9, "no training is longer"),
    "workers": (1024, "each is a process"),
    "log_every": (10**9, "no training is longer"),
    "checkpoint_minutes": (10**6, "that is two years"),
    "overlays": (100, "they are the rows of one picture"),
    "rank_timeout_minutes": (10_080, "that is a week"),
}
MAX_DEPTH = 64  # blocks in a stage


def require(condition: bool, key: str, got: object, need: str) -> None:
    """Raise `ConfigError` that names `key`, what it got and what it needs, unless `condition` holds."""
    if not condition:
        raise ConfigError(f"{key}: got {shown(got)}, expected {need}")


def require_finite(section: str, config: object) -> None:
    """Refuse infinities and NaN in any field: comparisons with a bound let some of them pass."""
    for key, value in vars(config).items():
        require(not isinstance(value, float) or math.isfinite(value), f"{section}.{key}", value, "a finite number")


def require_limits(section: str, config: object, limits: Mapping[str, tuple[float, str]]) -> None:
    """Refuse a value above the limit of its key."""
    for key, (most, reason) in limits.items():
        value = getattr(config, key)
        require(value <= most, f"{section}.{key}", value, f"at most {most} ({reason})")


def require_heads(dmwla_size: int, image_size: int) -> None:
    """Refuse what cannot be trained: a last head, a quarter of [S2] wide, of more pixels than the label [S1]."""
    need = f"at most {4 * image_size}: four times model.image_size, as the loss takes no head larger than the label"
    require(dmwla_size <= 4 * image_size, "model.dmwla_size", dmwla_size, need)


def require_memory(what: str, size: int) -> None:
    """Refuse what needs more than `MAX_MEMORY` bytes, before any of it is taken."""
    if size > MAX_MEMORY:
        raise ConfigError(f"{what}: got {size / 2**30:,.1f} GiB, expected at most {MAX_MEMORY >> 30} GiB")
