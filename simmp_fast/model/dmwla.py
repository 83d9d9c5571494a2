"""The DMW-LA block: dynamic memory weights, loss attention (section 2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..validation import product_dtype
from .memory import MemoryBank
from .projection import project


class DMWLABlock(nn.Module):
    """``y = x + output(context + memory)``: attention among an image's tokens, and to the slots of a token's cluster.

    While the bank is in warm-up the memory takes no part. In training, with gradients on, the block offers its tokens
    to the bank; nothing is written before `commit_memory`.

    Context attention may be *reassociated* (performance identity 3): with x the tokens,
    ``query . key = x (query^T key) x^T`` and ``output(A value(x)) = (A x) (output value)^T``, so that the attention
    runs in C dimensions in place of D.

    Args:
        channels: channels of the feature map [C].
        dim: feature dimension [D].
        bank: the block's memory.
        key_momentum: share of the old weights in the momentum key's update.
        backend: operator backend.

    Attributes:
        reassociate: True or False to have it so; None for the rule of `reassociates`.
    """

    momentum_key: Tensor

    def __init__(
        self, channels: int, dim: int, bank: MemoryBank, *, key_momentum: float = 0.95, backend: str = "auto"
    ) -> None:
        super().__init__()
        self.channels, self.dim = channels, dim
        self.query = nn.Linear(channels, dim, bias=False)
        self.key = nn.Linear(channels, dim, bias=False)
        self.value = nn.Linear(channels, dim, bias=False)
        self.output = nn.Linear(dim, channels, bias=False)
        self.register_buffer("momentum_key", self.key.weight.detach().clone())
        self.bank = bank
        self.key_momentum = key_momentum
        self.backend = backend
        self.reassociate: bool | None = None

    @property
    def reassociates(self) -> bool:
        """Whether context attention runs in C dimensions: where C < D, and never in the reference, unless set."""
        if self.reassociate is not None:
            return self.reassociate
        return self.channels < self.dim and self.backend != "reference"

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to ``[B, C, H, W]``."""
        # One copy in the dtype of the products serves all of them, the attention and the bank. `to` lays out what it
        # casts, and leaves alone what it need not cast.
        tokens = x.flatten(2).transpose(1, 2).to(product_dtype(x), memory_format=torch.contiguous_format).contiguous()
        added = self._reassociated(tokens) if self.reassociates else self._plain(tokens)
        if self.bank.undecided:
            query = F.linear(tokens, self.query.weight.to(tokens.dtype))
            recalled, _ = ops.memory_attention(query, self.bank.memory, self.bank.prototypes, backend=self.backend)
            added = added + self.output(torch.where(self.bank.structured >= 0.5, recalled, 0.0))
        return x + added.transpose(1, 2).reshape(x.shape)

    def _plain(self, tokens: Tensor) -> Tensor:
        """``output(context + memory)`` as section 2 writes it, all projections in one product."""
        query, key, value = project(tokens, [self.query.weight, self.key.weight, self.value.weight])
        if self.bank.warming:
            if self._offers:
                self.bank.offer(key)
            return self.output(ops.context_attention(query, key, value, backend=self.backend))
        if self._offers:
            self.bank.offer(tokens, self.momentum_key)
        attended, _ = ops.memory_context_attention(
            query, key, value, self.bank.memory, self.bank.prototypes, backend=self.backend
        )
        return self.output(attended)

    def _reassociated(self, tokens: Tensor) -> Tensor:
        """The same sum with the context in C dimensions; its two small products take the gradients of the weights."""
        scores = self.key.weight.T @ self.query.weight
        mixed = self.output.weight @ self.value.weight
        if self.bank.warming:
            if self._offers:
                with torch.no_grad():
                    self.bank.offer(self.key(tokens))
            return self._context(F.linear(tokens, scores), tokens, mixed)
        source, query = project(tokens, [scores, self.query.weight])
        if self._offers:
            self.bank.offer(tokens, self.momentum_key)
        recalled, _ = ops.memory_attention(query, self.bank.memory, self.bank.prototypes, backend=self.backend)
        return self._context(source, tokens, mixed) + self.output(recalled)

    def _context(self, source: Tensor, tokens: Tensor, mixed: Tensor) -> Tensor:
        return F.linear(ops.context_attention(source, tokens, tokens, backend=self.backend), mixed)

    @property
    def _offers(self) -> bool:
        """Whether this forward belongs to a training step that the bank learns from."""
        return self.training and torch.is_grad_enabled()

    def commit_memory(self, k: int | Tensor, keep: Tensor | None = None) -> None:
        """Write the last training forward into the bank and move the momentum key; call it after backward.

        Args:
            k: slots to write per cluster.
            keep: 0-d bool tensor; where false, nothing changes but the step counter.

        Raises:
            RuntimeError: no training forward came before.
        """
        self.bank.prepare()
        self.write_memory(k, keep)
        self.bank.advance()

    @torch.no_grad()
    def write_memory(self, k: int | Tensor, keep: Tensor | None = None) -> None:
        """The part of `commit_memory` that runs on the device, without the warm-up's draws and the step counter."""
        self.bank.write(k, keep)
        if not self.bank.warming:
            moved = self.key_momentum * self.momentum_key + (1 - self.key_momentum) * self.key.weight
            self.momentum_key.copy_(moved if keep is None else torch.where(keep, moved, self.momentum_key))
