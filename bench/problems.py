"""The inputs of every case: one set-up for speed, memory, launches and parity.

Queries and keys are scaled so that scores have unit variance, as those of a trained network do: a saturated softmax
would hide errors and idle the memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from simmp_fast import ops
from simmp_fast.config import ModelConfig, preset

from .backends import Backend, compiled, sdpa
from .formulas import head_sides

Sizes = Mapping[str, int]
SEED = 2222


@dataclass
class Problem:
    """Inputs of a case on its device.

    Attributes:
        operator: whose inputs these are.
        arguments: of the operator, or of the module's forward.
        leaves: tensors whose gradients are taken; empty where the operator has none.
        module: the module that is measured, None for an operator.
        autocast: dtype of autocast around the call, None for none.
    """

    operator: str
    arguments: dict[str, Any]
    leaves: list[Tensor] = field(default_factory=list)
    module: torch.nn.Module | None = None
    autocast: torch.dtype | None = None
    _runs: dict[str, Callable[..., Any]] = field(default_factory=dict, repr=False)

    def candidate(self, backend: Backend) -> Callable[..., Any]:
        """The operator or module on a backend: takes its arguments, returns what it returns."""
        if backend.name not in self._runs:
            call = self._operator_call(backend) if self.module is None else self.module
            self._runs[backend.name] = compiled(call) if backend.compiled else call
        run = self.in_autocast(self._runs[backend.name])

        def call_on(**arguments: Any) -> Any:
            self._enter(backend)
            result = run(**arguments)
            self._discard()
            return result

        return call_on

    def in_autocast(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call` under the case's autocast, where it has one."""
        dtype, device = self.autocast, self.device.type

        def under(*positional: Any, **named: Any) -> Any:
            with torch.autocast(device, dtype, enabled=dtype is not None):
                return call(*positional, **named)

        return under

    def run(self, backend: Backend) -> Callable[[], Any]:
        """`candidate` on the case's own arguments: what is measured."""
        call, arguments = self.candidate(backend), self.arguments
        return lambda: call(**arguments)

    def output(self, backend: Backend) -> Callable[[], Tensor]:
        """`run`, of whose results only that is returned which gradients flow from: the first."""
        run = self.run(backend)

        def measured() -> Tensor:
            result = run()
            first: Tensor = result[0] if isinstance(result, tuple) else result
            return first

        return measured

    @property
    def device(self) -> torch.device:
        """Where the inputs are."""
        first = next(iter(self.arguments.values()))
        device: torch.device = (first[0] if isinstance(first, list) else first).device
        return device

    def _operator_call(self, backend: Backend) -> Callable[..., Any]:
        if backend.door == "sdpa":
            return sdpa(backend.attention)
        operator, door = getattr(ops, self.operator), backend.door

        def call(**arguments: Any) -> Any:
            return operator(**arguments, backend=door)

        return call

    def _enter(self, backend: Backend) -> None:
        """Point the module at a backend."""
        for part in self._parts:
            part.backend = backend.door

    def _discard(self) -> None:
        """Forget what the forward pass offered to the memory: no update follows."""
        for part in self._parts:
            if hasattr(part, "discard"):
                part.discard()

    @functools.cached_property
    def _parts(self) -> list[Any]:
        """The modules that choose a backend."""
        parts = [] if self.module is None else list(self.module.modules())
        return [part for part in parts if hasattr(part, "backend")]


class _Draw:
    """Random tensors of one case: equal numbers on every device and in every dtype, up to rounding."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator().manual_seed(SEED)

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        values = torch.randn(shape, generator=self.generator) * scale
        return values.to(self.device, self.dtype if dtype is None else dtype)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator).to(self.device)

    def tokens(self, s: Sizes, width: str = "D", scale: float | None = None) -> Tensor:
        return self.normal(s["B"], s["N"], s[width], scale=s[width] ** -0.25 if scale is None else scale)

    def bank(self, s: Sizes) -> dict[str, Tensor]:
        memory = self.normal(s["K"], s["M"], s["D"], scale=s["D"] ** -0.25, dtype=torch.float32)
        return {"memory": memory, "prototypes": memory.mean(1)}


def _assign(s: Sizes, draw: _Draw) -> Problem:
    prototypes = draw.normal(s["K"], s["D"], dtype=torch.float32)
    return Problem("assign_clusters", {"query": draw.tokens(s), "prototypes": prototypes})


def _attention_inputs(s: Sizes, draw: _Draw, width: str = "D") -> dict[str, Tensor]:
    """Keys have a mean, as the network's do: gradients whose row sums were rounded show only then."""
    query, key = draw.tokens(s, width), draw.tokens(s, width) + 1
    return {"query": query, "key": key, "value": draw.tokens(s, width, scale=1.0)}


def _context(s: Sizes, draw: _Draw) -> Problem:
    return _with_gradients("context_attention", _attention_inputs(s, draw))


def _memory(s: Sizes, draw: _Draw) -> Problem:
    return _with_gradients("memory_attention", {"query": draw.tokens(s)}, draw.bank(s))


def _joint(s: Sizes, draw: _Draw) -> Problem:
    return _with_gradients("memory_context_attention", _attention_inputs(s, draw), draw.bank(s))


def _update(s: Sizes, draw: _Draw) -> Problem:
    k = torch.tensor(min(s["k"], s["M"]), device=draw.device)
    return Problem("update_memory", {"tokens": draw.tokens(s), **draw.bank(s), "k": k})


def _window(s: Sizes, draw: _Draw) -> Problem:
    return Problem("window_similarity", {"x": draw.normal(s["B"], s["C"], s["H"], s["W"]), "window": s["window"]})


def _decay(s: Sizes, draw: _Draw) -> Problem:
    grid = s["H"], s["W"]
    score = torch.rand(s["B"], (grid[0] // s["window"]) * (grid[1] // s["window"]), device=draw.device)
    constants = {"grid": grid, "window": s["window"], "gamma": 0.8, "variant": "paper", "dtype": draw.dtype}
    return Problem("decay_weights", {"score": score, **constants})


def _threshold(s: Sizes, draw: _Draw) -> Problem:
    return Problem("split_threshold", {name: draw.tokens(s, "C") for name in ("query", "key")})


def _split(s: Sizes, draw: _Draw) -> Problem:
    inputs = _attention_inputs(s, draw, "C")
    row_mean, threshold = ops.split_threshold(inputs["query"], inputs["key"], backend="portable")
    return _with_gradients("split_attention", inputs, {"row_mean": row_mean, "threshold": threshold})


def _loss(s: Sizes, draw: _Draw) -> Problem:
    heads = [draw.normal(s["B"], s["classes"], side, side).requires_grad_() for side in head_sides(s)]
    label = draw.integers(s["classes"], s["B"], s["side"], s["side"])
    return Problem("powerset_loss", {"heads": heads, "label": label}, heads)


def _block(s: Sizes, draw: _Draw) -> Problem:
    side = round(s["N"] ** 0.5)
    if side * side != s["N"]:
        raise ValueError(f"N: got {s['N']}, expected a square number of tokens")
    from simmp_fast.model.dmwla import DMWLABlock
    from simmp_fast.model.memory import MemoryBank

    torch.manual_seed(SEED)
    bank = MemoryBank(s["K"], s["M"], s["D"], warmup_steps=1)
    block = DMWLABlock(s["C"], s["D"], bank)
    bank.set_extra_state(torch.tensor(1))
    filled = draw.bank(s)
    bank.memory.copy_(filled["memory"])
    bank.prototypes.copy_(filled["prototypes"])
    return _of_module("dmwla_block", block, {"x": (s["B"], s["C"], side, side)}, draw)


def _dsgim(s: Sizes, draw: _Draw) -> Problem:
    from simmp_fast.model.dsgim import DSGIM, decay

    torch.manual_seed(SEED)
    module = DSGIM(s["C"], s["window"])
    return _of_module("dsgim", module, {"x": (s["B"], s["C"], s["H"], s["W"])}, draw, gamma=decay(0))


def _of_module(
    name: str, module: torch.nn.Module, shapes: dict[str, tuple[int, ...]], draw: _Draw, **constants: Any
) -> Problem:
    """A module keeps float32 weights and runs under autocast in a half dtype, as in training."""
    half = draw.dtype if draw.dtype in (torch.bfloat16, torch.float16) else None
    dtype = torch.float32 if half is not None else draw.dtype
    module = module.to(draw.device, dtype).train()
    inputs = {key: draw.normal(*shape, dtype=dtype).requires_grad_() for key, shape in shapes.items()}
    leaves = [*inputs.values(), *(p for p in module.parameters() if p.requires_grad)]
    return Problem(name, {**inputs, **constants}, leaves, module, half)


def _with_gradients(name: str, inputs: dict[str, Tensor], constants: dict[str, Tensor] | None = None) -> Problem:
    for tensor in inputs.values():
        tensor.requires_grad_()
    return Problem(name, {**inputs, **(constants or {})}, list(inputs.values()))


PROBLEMS: dict[str, Callable[[Sizes, _Draw], Problem]] = {
    "assign_clusters": _assign,
    "context_attention": _context,
    "memory_attention": _memory,
    "memory_context_attention": _joint,
    "update_memory": _update,
    "window_similarity": _window,
    "decay_weights": _decay,
    "split_threshold": _threshold,
    "split_attention": _split,
    "powerset_loss": _loss,
    "dmwla_block": _block,
    "dsgim": _dsgim,
}


def make(operator: str, sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Problem:
    """The inputs of a case."""
    return PROBLEMS[operator](sizes, _Draw(dtype, device))


def network_config(side: int) -> ModelConfig:
    """The `synapse` network at 256 pixels; below, a small one for the fast mode."""
    if side >= 256:
        return replace(preset("synapse").model, image_size=side)
    return replace(preset("small").model, image_size=side, dmwla_size=side)
