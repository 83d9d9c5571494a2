"""The memory bank of a DMW-LA block and its life: warm-up, structuring, update (section 3).

A training forward only *offers* its tokens; `write`, called after that forward's backward, writes them. So tensors
saved for backward stay as they were, addresses never change, and recomputation under activation checkpointing writes
nothing. The phase is a 0-d buffer, so whatever copies, averages or saves a bank takes it along, and the host keeps its
value in mind: a training step reads no device value to find it.

A step of the bank has three parts: `prepare` draws on the host, `write` runs on the device alone and can be compiled or
captured in a CUDA graph, `advance` counts on the host.
"""

from __future__ import annotations

import hashlib
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ..parallel.update_memory import update_memory
from ..ranks import ALONE, Ranks
from .structuring import structure


def named_generator(seed: int, name: str, step: int) -> torch.Generator:
    """The CPU generator of one bank at one step.

    It is a function of its arguments alone, so it needs no state of its own: `seed` and `step` are saved with the run,
    and every rank and every resumed run draws the same numbers.
    """
    digest = hashlib.blake2b(f"{seed} {name} {step}".encode(), digest_size=8).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little") >> 1)


def _number(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """A 0-d tensor on the CPU, whatever the default device is."""
    return torch.tensor(value, dtype=dtype, device="cpu")


def _is_structured(flag: Tensor) -> bool:
    """Whether a bank with this value of `structured` is; one value for all of those that `torch.vmap` stacks."""
    while torch._C._functorch.is_functorch_wrapped_tensor(flag):
        flag = torch._C._functorch.get_unwrapped(flag)
    structured = (flag.detach() >= 0.5).flatten().tolist()
    if len(set(structured)) > 1:
        raise ValueError(f"structured: got memory banks in both phases, {structured}, under one call of torch.vmap")
    return structured[0]


def _recomputing() -> bool:
    """Whether this forward runs inside a backward pass, as activation checkpointing does."""
    return torch._C._current_graph_task_id() != -1


class MemoryBank(nn.Module):
    """``K`` clusters of ``M`` slots and their prototypes, both uniform in [0, 1) at first.

    Args:
        clusters, slots, dim: K, M and D.
        warmup_steps: training steps that fill the bank with random tokens before it is structured.
        rate: weight of the token in a write.
        seed: seed of the warm-up draws.
        name: the bank's own name; two banks of one network must not share it.
        backend: backend of `update_memory`.

    Attributes:
        memory: ``[K, M, D]``.
        prototypes: ``[K, D]``.
        structured: 0-d float32, 0 in warm-up and 1 from the structuring on; an average of both counts as structured
            from 0.5 on.
        step: training steps committed so far; a host integer, saved in the extra state. At least `warmup_steps` where
            the bank is structured, less in warm-up.
        warming: whether the bank is still in warm-up: it is filled, but not yet attended to.
        ranks: the processes whose tokens it takes, each with as many images; their banks stay equal bit for bit.
    """

    memory: Tensor
    prototypes: Tensor
    structured: Tensor

    def __init__(
        self,
        clusters: int,
        slots: int,
        dim: int,
        *,
        warmup_steps: int = 2000,
        rate: float = 0.3,
        seed: int = 2222,
        name: str = "bank",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.register_buffer("memory", torch.rand(clusters, slots, dim))
        self.register_buffer("prototypes", torch.rand(clusters, dim))
        self.register_buffer("structured", torch.tensor(float(warmup_steps == 0)))
        self.warmup_steps, self.rate, self.seed, self.name = warmup_steps, rate, seed, name
        self.backend = backend
        self.ranks: Ranks = ALONE
        self._offered: tuple[Tensor, Tensor | None] | None = None
        self._draws: Tensor | None = None
        self._step, self._warming = 0, warmup_steps > 0
        self._note()

    def extra_repr(self) -> str:
        clusters, slots, dim = self.memory.shape
        return f"clusters={clusters}, slots={slots}, dim={dim}, step={self.step}, name={self.name!r}"

    @property
    def step(self) -> int:
        self._follow()
        return self._counted()

    @property
    def warming(self) -> bool:
        self._follow()
        return self._warming

    @property
    def undecided(self) -> bool:
        """Whether the device alone can say if the bank is still `warming`: compiled evaluation cannot look, and an
        average may have been structured since somebody did.
        """
        return torch.compiler.is_compiling() and self._warming and not self.training

    def train(self, mode: bool = True) -> Self:
        """Set the mode, and look at the phase anew."""
        super().train(mode)
        self._follow(again=True)
        return self

    def _follow(self, again: bool = False) -> None:
        """Take over the phase that somebody else wrote to `structured`, with a loaded, copied or averaged state.

        The device is read only where the buffer changed, or where it must be read `again`: a write through ``.data``
        is not counted as a change, so a bank in warm-up also looks whenever it is evaluated. Compiled code guards on
        the phase known to the host, which is a flag of its own: the counter changes at every step.
        """
        if torch.compiler.is_compiling() or not self._readable():
            return
        again = again or (self._warming and not self.training)
        if again or self._seen[0] is not self.structured or self._seen[1] != self._writes():
            self._warming = not _is_structured(self.structured)
            self._note()

    def _readable(self) -> bool:
        flag = self.structured
        if flag.is_meta or isinstance(flag, FakeTensor):
            return False
        return not (flag.is_cuda and torch.cuda.is_current_stream_capturing())

    def _writes(self) -> int:
        return -1 if self.structured.is_inference() else self.structured._version

    def _note(self) -> None:
        self._seen = self.structured, self._writes()

    def _counted(self) -> int:
        """The counter in the phase known to the host; a phase that was lent for a while leaves no trace in it."""
        return self._step_in(not self._warming, self._step)

    def _step_in(self, structured: bool, step: int) -> int:
        """The counter nearest to `step` that agrees with a phase."""
        return max(step, self.warmup_steps) if structured else min(step, self.warmup_steps - 1)

    def _enter(self, step: int) -> None:
        self._step, warming = step, step < self.warmup_steps
        if warming != self._warming:
            self._warming = warming
            self.structured.copy_(_number(float(not warming)))
            self._note()

    def get_extra_state(self) -> Tensor:
        """The step counter as an int64 tensor, so that a state dict holds tensors alone."""
        return _number(self._counted(), torch.int64)  # averages ask at every step, and must not wait

    def set_extra_state(self, state: Tensor) -> None:
        """Restore the step counter and enter its phase; whatever was offered before belongs to another life."""
        self._follow()
        self._enter(int(state))
        self._offered = None

    def reconcile(self, state: dict[str, Any], prefix: str) -> None:
        """Make phase and counter of this bank agree in a state dict, in place.

        A state without a phase takes it from the counter; where both are there the phase wins, since it is averaged
        and copied with the memory.

        Args:
            state: names and tensors.
            prefix: what the names of this bank begin with, such as ``"bank."``.
        """
        flag, counter = f"{prefix}structured", f"{prefix}_extra_state"
        if counter not in state:
            return
        step = int(state[counter])
        if flag in state:
            state[counter] = _number(self._step_in(float(state[flag]) >= 0.5, step), torch.int64)
        else:
            state[flag] = _number(float(step >= self.warmup_steps))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        self.reconcile(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def offer(self, tokens: Tensor, weight: Tensor | None = None) -> None:
        """Keep the tokens of a training forward until `write` or `discard`.

        Args:
            tokens: ``[B, N, D]``, or ``[B, N, C]`` where they are to be projected first.
            weight: ``[D, C]``, the projection; `write` takes it, so that its result is not held over the backward pass.

        Raises:
            RuntimeError: tokens of an earlier forward were neither committed nor discarded.
        """
        if self._offered is not None:
            if _recomputing():
                return
            raise RuntimeError(
                f"memory bank {self.name!r}: the tokens of the last training forward were never committed; call "
                "commit_memory() after each backward, or discard_memory() where no backward follows"
            )
        self._offered = tokens.detach(), weight

    def discard(self) -> None:
        """Forget the tokens offered last; nothing is written."""
        self._offered = None

    def prepare(self, batch: int | None = None) -> None:
        """Draw what the next `write` of the warm-up takes (section 3.1); after the warm-up there is nothing to draw.

        The draws lie on the device at one address, so a captured `write` finds the new ones there.

        Args:
            batch: images of the step on this rank; those of the tokens offered last where it is None. Every rank
                draws for the images of all.

        Raises:
            RuntimeError: no batch is given and no tokens were offered.
        """
        batch = self._taken()[0].shape[0] if batch is None else batch
        if not self.warming or batch == 0:
            return
        draws = self._draw(batch * self.ranks.size)
        if self._draws is None or (self._draws.shape, self._draws.device) != (draws.shape, self.memory.device):
            self._draws = torch.empty(draws.shape, dtype=draws.dtype, device=self.memory.device)
        if self._draws.is_cuda:
            draws = draws.pin_memory()  # so that the copy is not waited for
        self._draws.copy_(draws, non_blocking=True)

    def _draw(self, batch: int) -> Tensor:
        """``[4, draws]`` int64: image, place in it in units of 2^-31 of its length, slot, and whether it is written.

        Their number is the same at every step; the last row says how many of them are written.
        """
        size = self.memory.shape[0] * self.memory.shape[1]
        per_image = max(size // batch, 1)
        drawn = batch * per_image
        width = min(drawn, size)
        kept = min(max(1, int(0.5 * (self.step + 1) / self.warmup_steps * drawn)), width)
        generator = named_generator(self.seed, self.name, self.step)
        image = torch.randperm(drawn, generator=generator, device="cpu")[:width] // per_image
        place = torch.randint(2**31, (width,), generator=generator, device="cpu")
        slot = torch.randperm(size, generator=generator, device="cpu")[:width]
        return torch.stack([image, place, slot, (torch.arange(width, device="cpu") < kept).long()])

    def _taken(self) -> tuple[Tensor, Tensor | None]:
        if self._offered is None:
            raise RuntimeError(f"memory bank {self.name!r}: nothing to commit, no training forward came before")
        return self._offered

    @torch.no_grad()
    def write(self, k: int | Tensor, keep: Tensor | None = None) -> None:
        """Write the tokens offered last into the bank; in warm-up `prepare` comes before.

        Args:
            k: slots to write per cluster (after warm-up).
            keep: 0-d bool tensor; where false, the bank keeps its values. It is never read on the host.

        Raises:
            RuntimeError: no tokens were offered since the last write.
        """
        (tokens, weight), self._offered = self._taken(), None
        if tokens.numel() == 0:
            return
        if weight is not None:
            tokens = F.linear(tokens, weight.to(tokens.dtype))
        if self.warming:
            memory, prototypes = self._with_random_tokens(tokens), self.prototypes
        else:
            memory, prototypes = update_memory(
                tokens, self.memory, self.prototypes, k, rate=self.rate, backend=self.backend, ranks=self.ranks
            )
        if keep is not None:
            memory = torch.where(keep, memory, self.memory)
            prototypes = torch.where(keep, prototypes, self.prototypes)
        self._store(memory, prototypes)

    @torch.no_grad()
    def advance(self) -> None:
        """Count a training step; the last one of the warm-up structures the bank."""
        self._enter(self.step + 1)
        if self.step == self.warmup_steps:
            generator = named_generator(self.seed, self.name, self.step)
            # On one rank alone: k-means adds in an order that depends on the processor and its threads.
            self._store(*self.ranks.first(lambda: structure(self.memory.cpu(), generator)))

    def _store(self, memory: Tensor, prototypes: Tensor) -> None:
        """Copy in place: the addresses of the bank never change."""
        self.memory.copy_(memory)
        self.prototypes.copy_(prototypes)

    def _with_random_tokens(self, tokens: Tensor) -> Tensor:
        """The bank after one warm-up write of the tokens and slots that `prepare` drew (section 3.1)."""
        if self._draws is None:
            raise RuntimeError(f"memory bank {self.name!r}: nothing was drawn for this write, call prepare() before it")
        image, place, slot, written = self._draws
        length, flat = tokens.shape[1], self.memory.flatten(0, 1)
        drawn = self.ranks.rows(tokens.flatten(0, 1), image * length + (place * length >> 31)).to(flat.dtype)
        values = torch.where(written.bool().unsqueeze(1), drawn, flat[slot])
        return flat.index_copy(0, slot, values).view_as(self.memory)
