"""What the training tests share: a tiny cache, a tiny network with the real one's interface, and a child process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from simmp_fast.config import Config, from_mapping, to_mapping
from simmp_fast.data.cache import Cache, CacheWriter
from simmp_fast.data.preprocess import Geometry, Intensity, Recipe
from simmp_fast.model.wld import UpdateWidth
from simmp_fast.training import loop
from simmp_fast.training.checkpoint import load_last
from simmp_fast.training.log import read_metrics

ROOT = Path(__file__).resolve().parents[2]
CLASSES = ("background", "disc", "square")


class TinyModel(nn.Module):
    """Four heads of a small convolution, with dropout, batch norm, a memory and W-LD."""

    memory: Tensor
    dropout = 0.2

    def __init__(self, config: Any, backend: str = "auto") -> None:
        super().__init__()
        self.config, self.backend = config, backend
        self.backbone = nn.Sequential(nn.Conv2d(config.in_channels, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.heads = nn.ModuleList(nn.Conv2d(6, config.classes, 1) for _ in range(4))
        self.register_buffer("memory", torch.zeros(6))
        self.wld = UpdateWidth(config.slots)
        self.steps = 0
        self._offered: Tensor | None = None

    memory_phase = "structured"

    def forward(self, image: Tensor, *, native_heads: bool = False) -> list[Tensor]:
        x = nn.functional.dropout(self.backbone(image), self.dropout, self.training)
        if self.training and torch.is_grad_enabled():
            self._offered = x.detach().mean((0, 2, 3))
        pooled = [nn.functional.avg_pool2d(x, s) if native_heads and s > 1 else x for s in (8, 4, 2, 1)]
        return [head(p) for head, p in zip(self.heads, pooled, strict=True)]

    def prepare_memory(self, batch: int) -> None:
        """Nothing is drawn."""

    def write_memory(self, keep: Tensor) -> None:
        assert self._offered is not None
        self.memory.copy_(torch.where(keep, 0.9 * self.memory + 0.1 * self._offered, self.memory))
        self._offered = None

    def advance_memory(self) -> None:
        self.steps += 1

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.steps)

    def set_extra_state(self, state: Tensor) -> None:
        self.steps = int(state)


def make_cache(folder: Path, *, train: int = 10, validation: int = 4, side: int = 64) -> Cache:
    """A prepared cache of cases of two slices: a bright disc and a brighter square at random places."""
    rng = np.random.default_rng(0)
    recipe = Recipe("shapes", CLASSES, 1, side, Intensity("range", 0, 255))
    names = [f"case{i:02d}" for i in range((train + validation) // 2)]
    folder.mkdir(parents=True)
    with CacheWriter(folder, recipe, train + validation, "uint8") as writer:
        for name in names:
            y, x = np.mgrid[:side, :side]
            image = rng.uniform(0, 0.2, (2, 1, side, side)).astype(np.float32)
            label = np.zeros((2, side, side), np.uint8)
            for i in range(2):
                (a, b), (c, d) = rng.integers(10, side - 10, (2, 2))
                label[i][(y - a) ** 2 + (x - b) ** 2 < 80] = 1
                label[i][(abs(y - c) < 7) & (abs(x - d) < 7)] = 2
                image[i, 0] += 0.35 * label[i]
            writer.add(name, f"{name}.npz", image, label, label, Geometry((2, side, side)))
        writer.finish({"train": names[: train // 2], "validation": names[train // 2 :], "test": []})
    return Cache.open(folder)


def tiny_config(**train: Any) -> Config:
    """Three classes at 64 pixels; a model that takes a third of a second a step on one core."""
    model = {
        "classes": 3, "image_size": 64, "dmwla_size": 64, "backbone": "maxvit_rmlp_pico_rw_256",
        "depths": [1, 1, 1, 1], "clusters": 3, "feature_dim": 8, "decoder_clusters": 2, "decoder_feature_dim": 8,
        "slots": 8, "warmup_steps": 4,
    }  # fmt: skip
    defaults = {
        "epochs": 3, "batch_size": 2, "lr": 1e-3, "validate_from": 0, "keep_every": 0, "wld_from": 1, "log_every": 2,
        "overlays": 0, "backend": "reference",
    }  # fmt: skip
    return from_mapping(Config, {"model": model, "train": {**defaults, **train}})


def fingerprint(run: Path) -> dict[str, Any]:
    """Everything that a run which was interrupted and one which was not must share, bit for bit."""
    loaded = load_last(run)
    assert loaded is not None
    tensors, meta, state = loaded
    moments = {
        f"{index}.{name}": value
        for index, values in state.optimizer["state"].items()
        for name, value in values.items()
    }  # fmt: skip
    timeless = [
        {k: v for k, v in row.items() if k not in ("time", "images_per_second")}
        for row in read_metrics(run / "metrics.jsonl")
    ]
    return {
        "tensors": tensors,
        "moments": moments,
        "groups": state.optimizer["param_groups"],
        "rng": state.rng,
        "position": (meta.step, meta.epoch, state.step, state.epoch, state.batch, state.loss_sum, state.best),
        "rows": timeless,
    }


def assert_equal_runs(one: Path, other: Path) -> None:
    """Fail unless two finished runs are bitwise the same."""
    a, b = fingerprint(one), fingerprint(other)
    for part in ("tensors", "moments"):
        assert a[part].keys() == b[part].keys()
        different = [name for name in a[part] if not torch.equal(a[part][name], b[part][name])]
        assert not different, f"{part} differ: {different[:5]}"
    assert torch.equal(a["rng"]["torch"], b["rng"]["torch"])
    assert a["rng"]["python"] == b["rng"]["python"]
    for part in ("groups", "position", "rows"):
        assert a[part] == b[part]


def start_child(cache: Path, run: Path, config: Config, *, resume: bool = False, **options: Any) -> subprocess.Popen:
    """`train` in a process of its own. Options: `stub` uses `TinyModel`, `pause` seconds are slept in each step."""
    job = {"cache": str(cache), "run": str(run), "resume": resume, "config": to_mapping(config), **options}
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, __file__, json.dumps(job)],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(condition: Any, process: subprocess.Popen, seconds: float = 60) -> None:
    """Poll until `condition()` holds; fail if the child ends first."""
    end = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None:
            assert process.stderr is not None
            raise AssertionError(f"the child ended early: {process.stderr.read()}")
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.005)


def _child() -> None:
    job = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    if job.get("stub"):
        loop.SimMPNet = TinyModel  # type: ignore[assignment,misc]
    if pause := job.get("pause"):
        plain = loop.TrainStep.__call__

        def slow(self: Any, *arguments: Any, **keywords: Any) -> Tensor:
            time.sleep(pause)
            return plain(self, *arguments, **keywords)

        loop.TrainStep.__call__ = slow  # type: ignore[method-assign]
    config = from_mapping(Config, job["config"])
    result = loop.train(config, Cache.open(job["cache"]), job["run"], resume=job["resume"], device="cpu")
    sys.exit(130 if result.interrupted else 0)


if __name__ == "__main__":
    _child()
