"""Training: from a prepared cache to a run folder, and on from where it stands."""

from simmp_fast.training.checkpoint import Metadata, load_model, read_weights
from simmp_fast.training.errors import TrainingError
from simmp_fast.training.loop import RunResult, train

__all__ = ["Metadata", "RunResult", "TrainingError", "load_model", "read_weights", "train"]
