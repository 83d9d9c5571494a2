"""Whether a configuration fits the data and the device."""

from __future__ import annotations

import torch

from simmp_fast.config import Config, ConfigError
from simmp_fast.data.cache import Cache
from simmp_fast.training.compiling import check_compiler


def check_device(config: Config, device: torch.device) -> None:
    """Raise `ConfigError` if the training step cannot be made on `device` as it is configured."""
    if config.train.cuda_graph and device.type != "cuda":
        raise ConfigError(f"train.cuda_graph: got true on {device.type}, expected a CUDA device")
    if config.train.compile:
        check_compiler(device)


def check_data(config: Config, cache: Cache) -> None:
    """Raise `ConfigError` unless the network was configured for the data in `cache`."""
    model = config.model
    for key, got, need in (
        ("classes", model.classes, len(cache.classes)),
        ("in_channels", model.in_channels, cache.channels),
        ("image_size", model.image_size, cache.image_size),
    ):
        if got != need:
            raise ConfigError(f"model.{key}: got {got}, expected {need} as the data set {cache.name!r} has")
    if not cache.splits.get("train"):
        raise ConfigError(f"data set {cache.name!r}: got no cases in the split 'train', expected at least one")
