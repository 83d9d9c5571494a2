"""W-LD: the width of the memory update follows the loss (section 4)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class UpdateWidth(nn.Module):
    """The number of slots written per cluster, one for all DMW-LA blocks; everything stays on the device.

    Args:
        slots: slots of a cluster [M].

    Attributes:
        k: 0-d int64, 1 to M; starts at ``max(1, M // 2)``.
        previous: 0-d float64, the loss remembered last.
        seen: 0-d int64, 1 once a loss was remembered, 0 before; a number, so that it can be averaged.
    """

    k: Tensor
    previous: Tensor
    seen: Tensor

    def __init__(self, slots: int) -> None:
        super().__init__()
        self.slots = slots
        self.start = max(1, slots // 2)
        self.register_buffer("k", torch.tensor(self.start, dtype=torch.int64))
        self.register_buffer("previous", torch.tensor(0.0, dtype=torch.float64))
        self.register_buffer("seen", torch.tensor(0, dtype=torch.int64))

    @torch.no_grad()
    def step(self, loss: Tensor) -> None:
        """Take one total loss (0-d, on the device) and set `k` for the updates that follow.

        ``k' = trunc(M * (0.5 - 0.5 * (previous - loss)))``; outside ``[M / 4, 3 M / 4]`` the start value. The first
        loss is only remembered; a non-finite one changes nothing.
        """
        loss = loss.detach().to(torch.float64)
        finite = loss.isfinite()
        proposed = (self.slots * (0.5 - 0.5 * (self.previous - loss))).trunc()
        inside = (proposed >= self.slots / 4) & (proposed <= 3 * self.slots / 4)
        wanted = torch.where(inside, proposed.clamp_min(1), self.start).to(torch.int64)
        self.k.copy_(torch.where(finite & (self.seen > 0), wanted, self.k))
        self.remember(loss)

    @torch.no_grad()
    def remember(self, loss: Tensor) -> None:
        """Take one total loss (0-d, on the device) for the next `step` to compare with; a non-finite one is ignored."""
        loss = loss.detach().to(torch.float64)
        finite = loss.isfinite()
        # Through a view: compiled by PyTorch 2.11, a write into a 0-d float64 tensor of a CPU itself is lost.
        self.previous[...] = torch.where(finite, loss, self.previous)
        self.seen.copy_(torch.where(finite, 1, self.seen))
