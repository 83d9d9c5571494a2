"""A network small enough to take hundreds of steps in a test."""

from __future__ import annotations

from dataclasses import replace

import pytest

from simmp_fast.config import ModelConfig, preset


@pytest.fixture(scope="session")
def tiny() -> ModelConfig:
    """The small preset, shrunk to one block a stage at 64 pixels."""
    return replace(
        preset("small").model,
        classes=3,
        image_size=64,
        dmwla_size=64,
        depths=(1, 1, 1, 1),
        clusters=3,
        feature_dim=8,
        decoder_clusters=2,
        decoder_feature_dim=8,
        slots=6,
        warmup_steps=4,
    )
