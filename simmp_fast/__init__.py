"""Sim-MPNet for medical image segmentation: fast, correct, usable.

``from simmp_fast import SimMPNet`` is all a script needs; the operators are in `simmp_fast.ops`, the definition they
follow in `simmp_fast.reference`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .config import Config, ConfigError, ModelConfig, TrainConfig, preset
    from .model.simmpnet import SimMPNet

_LAZY = {
    "Config": "config",
    "ConfigError": "config",
    "ModelConfig": "config",
    "SimMPNet": "model.simmpnet",
    "TrainConfig": "config",
    "preset": "config",
}

__all__ = ["Config", "ConfigError", "ModelConfig", "SimMPNet", "TrainConfig", "__version__", "preset"]


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that ``simmp-fast --help`` does not wait for torch."""
    if name in _LAZY:
        return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
