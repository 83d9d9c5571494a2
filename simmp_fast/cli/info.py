"""``simmp-fast info``: what a network is, and what this machine can do with it."""

from __future__ import annotations

import argparse
import importlib.util
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simmp_fast import __version__
from simmp_fast.cli.common import add_command, load_network

if TYPE_CHECKING:
    from simmp_fast.model import SimMPNet


def register(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "info",
        "show parameters, multiply-adds, backend and GPU of a network on this machine",
        "simmp-fast info --preset acdc",
    )
    parser.add_argument("model", type=Path, nargs="?", help="a run folder, checkpoint or converted folder")
    parser.add_argument("--preset", default="synapse", help="the network to describe if no model is named")
    parser.set_defaults(run=run)


def multiply_adds(model: SimMPNet) -> int:
    """Multiply-adds of one image through the network: products and convolutions, attention included.

    The memory counts as structured; the reference backend is counted, whose memory attention meets M slots a token.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from simmp_fast.model import SimMPNet

    with torch.device("meta"):
        twin = SimMPNet(model.config, backend="reference").eval()
        for block in twin.memory_blocks():
            block.bank.set_extra_state(torch.tensor(model.config.warmup_steps, device="cpu"))
        side = model.config.image_size
        image = torch.empty(1, model.config.in_channels, side, side)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            twin(image)
    return counter.get_total_flops() // 2


def _machine() -> dict[str, str]:
    import torch

    from simmp_fast.ops import choose_backend, why_not_triton

    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    reason = why_not_triton(device)
    triton = "not installed"
    if importlib.util.find_spec("triton") is not None:
        import triton as package

        triton = package.__version__
    gpu = "none"
    if cuda:
        major, minor = torch.cuda.get_device_capability()
        gpu = f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}"
    return {
        "simmp_fast": __version__,
        "Python, torch, Triton": f"{sys.version.split()[0]}, {torch.__version__}, {triton}",
        "platform": platform.platform(),
        "GPU": gpu,
        "Triton kernels": "can run here" if reason is None else f"cannot run here: {reason}",
        "backend 'auto' takes": choose_backend("auto", device),
    }


def run(arguments: argparse.Namespace) -> None:
    """Print the facts as aligned lines."""
    from simmp_fast.config import preset
    from simmp_fast.model import SimMPNet

    if arguments.model is not None:
        model, weights = load_network(arguments.model, "auto")
        name = str(weights)
    else:
        model, name = SimMPNet(preset(arguments.preset).model), f"preset {arguments.preset}"
    config = model.config
    unread = sum(p.numel() for p in model.decoder.channel_attention.parameters())
    facts = {
        "network": f"{name}, variant {config.variant}",
        "parameters": f"{model.parameter_count() / 1e6:.2f} M, backbone classifier and memory not counted "
        f"({unread:,} of them in a gate that the published count includes and no forward pass reads)",
        "multiply-adds": f"{multiply_adds(model) / 1e9:.2f} G for one {config.image_size}x{config.image_size} image "
        "(products and convolutions, attention included)",
        "classes, K, D, M": f"{config.classes}, {config.clusters}, {config.feature_dim}, {config.slots}",
        "memory": f"step {model.memory_step}, {model.memory_phase}, update width {int(model.wld.k)}",
        **_machine(),
    }
    width = max(map(len, facts))
    for key, value in facts.items():
        print(f"{key:{width}}  {value}")
