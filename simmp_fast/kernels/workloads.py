"""What a kernel is tuned on: the operator it belongs to, at the network's shapes and the published batch of 20."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Run = Callable[[], list[Tensor]]
BATCH, SLOTS, CLUSTERS = 20, 100, 9
# Tokens of the network's largest blocks, and the part of them that the largest block has in which a kernel runs at a
# width: context and memory together only where the context is not reassociated, that is from 14x14 tokens down, and in
# the decoder, at 128 channels, from 28x28; memory alone in the larger ones.
LARGEST = 3136
PARTS = {
    "context": {128: 4, 192: 4, 256: 16},
    "memory": {192: 4},
    "memory_context": {128: 4, 192: 4, 256: 16},
}
# More tokens than one program of the split's threshold holds.
LONG = 4096
HEADS, LABEL = (7, 14, 28, 56), 256


def _normal(*shape: int, dtype: torch.dtype, device: torch.device, scale: float = 1.0) -> Tensor:
    generator = torch.Generator(device).manual_seed(0)
    return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)


def _run(function: Callable[[], Tensor], leaves: list[Tensor], backward: bool) -> Run:
    """The forward pass without gradients, or the backward pass of one kept forward pass."""
    if not backward:

        def forward() -> list[Tensor]:
            with torch.no_grad():
                return [function()]

        return forward
    output = function()
    upstream = torch.ones_like(output)
    return lambda: list(torch.autograd.grad(output, leaves, upstream, retain_graph=True))


def _attention(kernels: Any, name: str, backward: bool, width: int, dtype: torch.dtype, device: torch.device) -> Run:
    tokens = max(1, LARGEST // PARTS[name].get(width, 1))
    leaves = [
        _normal(BATCH, tokens, width, dtype=dtype, device=device, scale=width**-0.25).requires_grad_() for _ in range(3)
    ]
    bank = torch.rand(CLUSTERS, SLOTS, width, device=device), torch.rand(CLUSTERS, width, device=device) - 0.5
    if name == "context":
        return _run(lambda: kernels.context_attention(*leaves), leaves, backward)
    if name == "memory":
        return _run(lambda: kernels.memory_attention(leaves[0], *bank)[0], leaves[:1], backward)
    return _run(lambda: kernels.memory_context_attention(*leaves, *bank)[0], leaves, backward)


def _bank(kernels: Any, update: bool, width: int, dtype: torch.dtype, device: torch.device) -> Run:
    tokens = _normal(BATCH, LARGEST, min(width, 256), dtype=dtype, device=device)
    memory = torch.rand(CLUSTERS, SLOTS, tokens.shape[2], device=device)
    prototypes = memory.mean(1) - 0.5
    if update:
        return lambda: list(kernels.update_memory(tokens, memory, prototypes, SLOTS // 2))
    return lambda: [kernels.assign_clusters(tokens, prototypes)]


def _split(kernels: Any, backward: bool, width: int, dtype: torch.dtype, device: torch.device) -> Run:
    leaves = [_normal(BATCH, 196, width, dtype=dtype, device=device).requires_grad_() for _ in range(3)]
    split = kernels.split_threshold(leaves[0], leaves[1])
    return _run(lambda: kernels.split_attention(*leaves, *split), leaves, backward)


def _threshold(kernels: Any, width: int, dtype: torch.dtype, device: torch.device) -> Run:
    tokens = LONG if width == 1 else min(width, 196)
    query, key = (_normal(BATCH, tokens, 384, dtype=dtype, device=device) for _ in range(2))
    return lambda: list(kernels.split_threshold(query, key))


def _windows(kernels: Any, decay: bool, width: int, dtype: torch.dtype, device: torch.device) -> Run:
    x = _normal(BATCH, 384 if width in (1, 512) else width, 14, 14, dtype=dtype, device=device)
    score = kernels.window_similarity(x, 7)
    if decay:
        return lambda: [kernels.decay_weights(score, (14, 14), 7, 0.8, "paper", dtype)]
    return lambda: [kernels.window_similarity(x, 7)]


def _loss(kernels: Any, backward: bool, width: int, dtype: torch.dtype, device: torch.device) -> Run:
    classes = 32 if width == 192 else 9
    heads = [_normal(BATCH, classes, s, s, dtype=dtype, device=device).requires_grad_() for s in HEADS]
    label = torch.randint(classes, (BATCH, LABEL, LABEL), device=device)
    return _run(lambda: kernels.powerset_loss(heads, label), heads, backward)


def workload(kernel: str, width: int, dtype: torch.dtype, device: torch.device) -> Run:
    """A call that spends its time in `kernel`, and returns what the kernel has a part in.

    Args:
        kernel: name in the table.
        width: shape class of the row.
        dtype: of the tensors.
        device: a CUDA device.

    Raises:
        ValueError: no workload is known for this kernel.
    """
    from simmp_fast import kernels

    family = kernel.partition("_forward")[0].partition("_backward")[0]
    backward = "backward" in kernel or kernel in ("split_attention_query", "split_attention_key_value")
    if kernel.startswith("split_attention"):
        return _split(kernels, backward, width, dtype, device)
    if family in ("context", "memory", "memory_context"):
        return _attention(kernels, family, backward, width, dtype, device)
    if kernel == "assign_clusters" or kernel.startswith("update_"):
        return _bank(kernels, kernel != "assign_clusters", width, dtype, device)
    if kernel.startswith("split_threshold"):
        return _threshold(kernels, width, dtype, device)
    if kernel in ("window_similarity", "decay_weights"):
        return _windows(kernels, kernel == "decay_weights", width, dtype, device)
    if kernel.startswith("powerset_loss"):
        return _loss(kernels, kernel in ("powerset_loss_pixels", "powerset_loss_cells"), width, dtype, device)
    raise ValueError(f"kernel: got {kernel!r}, which has no workload to tune it on")
