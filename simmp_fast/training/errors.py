"""The error of a training run that cannot go on."""

from __future__ import annotations


class TrainingError(RuntimeError):
    """Training stopped: says at which step, what was found, and which checkpoint is still good."""
