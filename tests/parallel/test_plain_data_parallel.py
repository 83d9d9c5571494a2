"""`DistributedDataParallel` with its default arguments around the network, as anybody may put it there."""

from __future__ import annotations

from dataclasses import replace

import processes
import torch
from torch.nn.parallel import DistributedDataParallel

from simmp_fast.config import preset
from simmp_fast.model import SimMPNet
from simmp_fast.ranks import Ranks

STEPS = 4  # two of warm-up, the second of which structures the memory, and two updates of it


def trained(ranks: Ranks) -> tuple[list[str], list[bool]]:
    """The phase before each step, and whether every gradient that was asked for came."""
    config = replace(
        preset("small").model, classes=3, image_size=64, dmwla_size=64, depths=(1, 1, 1, 1), clusters=3, feature_dim=8,
        decoder_clusters=2, decoder_feature_dim=8, slots=6, warmup_steps=2, backbone="coatnet_pico_rw_224",
    )  # fmt: skip
    torch.manual_seed(ranks.rank)
    model = SimMPNet(config, backend="portable").train()
    parallel = DistributedDataParallel(model)
    phases, complete = [], []
    for _ in range(STEPS):
        phases.append(model.memory_phase)
        model.zero_grad()
        torch.stack(parallel(torch.rand(2, 1, 64, 64))).square().mean().backward()
        model.commit_memory()
        complete.append(all((p.grad is not None) == p.requires_grad for p in model.parameters()))
    return phases, complete


def test_steps_in_both_phases() -> None:
    expected = (["warmup", "warmup", "structured", "structured"], [True] * STEPS)
    assert processes.run(trained, 2) == [expected] * 2
