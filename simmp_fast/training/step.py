"""One training step, and the flag that keeps a bad one from doing harm. Nothing here waits for the device."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from simmp_fast.config import TrainConfig
from simmp_fast.model.memory import MemoryBank
from simmp_fast.parallel.powerset_loss import powerset_loss
from simmp_fast.ranks import ALONE, Ranks
from simmp_fast.training.distributed import gradients_across
from simmp_fast.training.replay import CudaRecorder, Recorder, Replays

WidthChange = bool | Literal["remember"]


@dataclass(frozen=True)
class BadStep:
    """The first step whose loss or gradients were not finite.

    Attributes:
        step: number of that step, counted from 0.
        loss: its loss; finite where only the gradients were not.
    """

    step: int
    loss: float

    def describe(self) -> str:
        """What was not finite, in words."""
        if math.isfinite(self.loss):
            return f"the gradients are not finite (loss {self.loss:.6g})"
        return f"the loss is {self.loss}"


class FiniteGuard:
    """Remembers on the device the first bad step. From then on it masks all writes, so that the state stays good.

    The host learns of it only when it asks (`read`), which waits for the device.

    Attributes:
        step: 0-d int64, the first bad step, -1 if none.
        loss: 0-d float32, its loss.
        frozen: 0-d float32, 1 from the first bad step on, as the fused optimisers take it (`found_inf`).
    """

    def __init__(self, device: torch.device) -> None:
        self.step = torch.full((), -1, dtype=torch.int64, device=device)
        self.loss = torch.zeros((), dtype=torch.float32, device=device)
        self.frozen = torch.zeros((), dtype=torch.float32, device=device)

    def check(self, loss: Tensor, gradients: Sequence[Tensor], step: Tensor) -> Tensor:
        """Take note of step `step`, 0-d int64; returns a 0-d bool tensor: may its results be written?"""
        # The largest magnitude is NaN or infinite exactly if some gradient is; a sum of squares could overflow.
        largest = torch.nn.utils.get_total_norm(gradients, norm_type=math.inf)
        first = (self.step < 0) & ~(torch.isfinite(loss) & torch.isfinite(largest))
        self.step.copy_(torch.where(first, step, self.step))
        self.loss.copy_(torch.where(first, loss, self.loss))
        keep = self.step < 0
        self.frozen.copy_(~keep)
        return keep

    def read(self) -> BadStep | None:
        """The first bad step, or None. Waits for the device."""
        step = int(self.step)
        return None if step < 0 else BadStep(step, float(self.loss))


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW (fused) over all parameters (model definition, section 8).

    Those that ask for no gradient are never moved; they keep their number in saved states.
    """
    return torch.optim.AdamW(
        model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True, capturable=config.cuda_graph
    )


class TrainStep:
    """Forward, loss, backward, memory, optimiser, W-LD (model definition, sections 3, 4, 7, 8).

    Whatever runs on the device stands in one method without any host state, so that it can be replayed.

    On several ranks each takes its share of the batch; loss and gradients are of the whole batch, so all ranks take
    the same step, and the guard freezes them together.

    Args:
        model: the network, on `device`, in training mode; `config.channels_last` changes the layout of its weights.
        optimizer: of `make_optimizer`.
        config: the recipe.
        device: where to train.
        recorder: how to capture the step; by default CUDA graphs where `config.cuda_graph` asks for them.
        ranks: the processes that train together.

    Attributes:
        guard: the flag of the first bad step.
        loss_sum: 0-d float64, sum of the losses since it was last set to zero.
    """

    def __init__(
        self,
        model: Any,
        optimizer: torch.optim.AdamW,
        config: TrainConfig,
        device: torch.device,
        recorder: Recorder | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.model, self.optimizer, self.config, self.device = model, optimizer, config, device
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.banks = [module for module in model.modules() if isinstance(module, MemoryBank)]
        self.guard = FiniteGuard(device)
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        # With 1 in `found_inf` the fused optimiser leaves parameters and moments alone, decided on the device.
        optimizer.found_inf = self.guard.frozen  # type: ignore[attr-defined]
        if recorder is None and config.cuda_graph:
            recorder = CudaRecorder(device)
        self.replays = None if recorder is None else Replays(recorder)
        self.memory_format = torch.channels_last if config.channels_last else torch.preserve_format
        if config.channels_last:
            model.to(memory_format=torch.channels_last)
        self.ranks, self.forward = ranks, gradients_across(model, device, ranks)
        self._loss = torch.compile(self._plain_loss, dynamic=False) if config.compile else self._plain_loss
        self._number = torch.zeros((), dtype=torch.int64, device=device)
        self._batch: tuple[Tensor, Tensor] | None = None

    def __call__(self, images: Tensor, labels: Tensor, step: int, *, wld: WidthChange) -> Tensor:
        """Take one step.

        Args:
            images: [B, C, S1, S1] float32, on any device; pinned memory is copied without waiting.
            labels: [B, S1, S1] int64.
            step: number of this step, counted from 0; what the guard remembers.
            wld: whether W-LD sets the update width from this step's loss; "remember" lets it only remember that loss.

        Returns:
            The loss, 0-d float32 or wider, without gradient, on the device.

        Raises:
            TrainingError: the step was to be captured in a CUDA graph and cannot be.
        """
        batch = self._place(images, labels)
        self._number.fill_(step)
        self.model.prepare_memory(images.shape[0])
        call = functools.partial(self._on_device, *batch, wld)
        if self.replays is None:
            loss = call()
        else:
            phases = tuple(bank.warming for bank in self.banks)
            loss = self.replays((images.shape, images.dtype, phases, wld), call)
        self.model.advance_memory()
        return loss

    def _place(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The batch on the device; where steps are replayed, at the addresses of the batch before."""
        if self.replays is None:
            images = images.to(self.device, non_blocking=True, memory_format=self.memory_format)
            return images, labels.to(self.device, non_blocking=True)
        if self._batch is None or self._batch[0].shape != images.shape or self._batch[0].dtype != images.dtype:
            self._batch = (
                torch.empty_like(images, device=self.device, memory_format=self.memory_format),
                torch.empty_like(labels, device=self.device),
            )
        for mine, given in zip(self._batch, (images, labels), strict=True):
            mine.copy_(given, non_blocking=True)
        return self._batch

    def _plain_loss(self, images: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16"):
            heads = self.forward(images, native_heads=True)
            return powerset_loss(
                heads,
                labels,
                ce_weight=self.config.ce_weight,
                dice_weight=self.config.dice_weight,
                backend=self.config.backend,
                ranks=self.ranks,
            )

    def _on_device(self, images: Tensor, labels: Tensor, wld: WidthChange) -> Tensor:
        """The step, but for what the host draws and counts; its arguments are all that the host decides."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._loss(images, labels)
        loss.backward()
        loss = loss.detach()
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        keep = self.guard.check(loss, gradients, self._number)
        self.model.write_memory(keep)
        self.optimizer.step()
        if wld == "remember":
            self.model.wld.remember(loss)
        elif wld:
            self.model.wld.step(loss)
        self.loss_sum += loss
        return loss
