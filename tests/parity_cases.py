"""Inputs on which an implementation of an operator is compared with the definition: ordinary sizes and the edges."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Builder = Callable[["Maker"], dict[str, Any]]


@dataclass(frozen=True)
class Maker:
    """Makes the tensors of a case: values from one seed, rounded to `dtype`, on `device`."""

    generator: torch.Generator
    dtype: torch.dtype
    device: torch.device

    @property
    def bank_dtype(self) -> torch.dtype:
        """A bank is float64 beside float64 tokens and float32 beside all others."""
        return torch.promote_types(self.dtype, torch.float32)

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        values = torch.randn(shape, generator=self.generator, dtype=torch.float64) * scale
        return values.to(self.dtype if dtype is None else dtype).to(self.device)

    def uniform(self, *shape: int) -> Tensor:
        """In [0, 1), in the dtype of a bank."""
        return torch.rand(shape, generator=self.generator, dtype=torch.float64).to(self.bank_dtype).to(self.device)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator).to(self.device)


def strided(x: Tensor) -> Tensor:
    """`x` with the same values in memory that is not contiguous: every second element of a longer last axis."""
    return torch.stack((x, torch.full_like(x, float("nan"))), dim=-1)[..., 0]


# name -> case, by operator
CASES: dict[str, dict[str, Builder]] = {}


def case(*operators: str, name: str | None = None) -> Callable[[Builder], Builder]:
    """Register a builder under its own name (or `name`) for `operators`."""

    def register(builder: Builder) -> Builder:
        for operator in operators:
            CASES.setdefault(operator, {})[name or builder.__name__] = builder
        return builder

    return register


def build(operator: str, name: str, *, seed: int, dtype: torch.dtype, device: torch.device | str) -> dict[str, Any]:
    """The keyword arguments of a case."""
    generator = torch.Generator().manual_seed(seed)
    return CASES[operator][name](Maker(generator, dtype, torch.device(device)))


# --- token attention and the bank -----------------------------------------------------------------

_SIZES = {
    "odd": (2, 37, 19, 3, 11),
    "one_token": (2, 1, 8, 2, 5),
    "small_dim": (1, 33, 3, 4, 7),
    "past_a_tile": (1, 65, 16, 2, 17),
    "tile": (1, 128, 32, 4, 32),
    "one_cluster": (2, 50, 12, 1, 9),
    "one_slot": (2, 20, 12, 3, 1),
    "long": (2, 530, 24, 5, 20),
    "empty_batch": (0, 6, 8, 3, 5),
    "no_tokens": (2, 0, 8, 3, 5),
}


def _attention(m: Maker, batch: int, tokens: int, dim: int) -> dict[str, Any]:
    scale = dim**-0.25
    query, key = (m.normal(batch, tokens, dim, scale=scale) for _ in range(2))
    return {"query": query, "key": key, "value": m.normal(batch, tokens, dim)}


def _bank(m: Maker, clusters: int, slots: int, dim: int) -> dict[str, Any]:
    return {"memory": m.uniform(clusters, slots, dim), "prototypes": m.uniform(clusters, dim) - 0.5}


def _register_sizes(name: str, batch: int, tokens: int, dim: int, clusters: int, slots: int) -> None:
    case("context_attention", name=name)(lambda m: _attention(m, batch, tokens, dim))
    case("memory_attention", name=name)(
        lambda m: {"query": m.normal(batch, tokens, dim), **_bank(m, clusters, slots, dim)}
    )
    case("memory_context_attention", name=name)(
        lambda m: {**_attention(m, batch, tokens, dim), **_bank(m, clusters, slots, dim)}
    )
    for metric in ("cosine", "dot"):
        case("assign_clusters", name=f"{name}_{metric}")(
            lambda m, metric=metric: {
                "query": m.normal(batch, tokens, dim),
                "prototypes": m.normal(clusters, dim, dtype=m.bank_dtype),
                "metric": metric,
            }
        )
    case("update_memory", name=name)(
        lambda m: {
            "tokens": m.normal(batch, tokens, dim),
            **_bank(m, clusters, slots, dim),
            "k": max(1, slots // 2),
        }
    )


for _name, _sizes in _SIZES.items():
    _register_sizes(_name, *_sizes)


def _with_bank(operator_inputs: dict[str, Any], m: Maker) -> dict[str, Any]:
    return {**operator_inputs, **_bank(m, 3, 13, operator_inputs["query"].shape[-1])}


def _register_attention(name: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    case("context_attention", name=name)(lambda m: change(_attention(m, 2, 45, 16)))
    case("memory_context_attention", name=name)(lambda m: _with_bank(change(_attention(m, 2, 45, 16)), m))
    case("memory_attention", name=name)(lambda m: _with_bank({"query": change(_attention(m, 2, 45, 16))["query"]}, m))


_register_attention("zeros", lambda x: {n: torch.zeros_like(t) for n, t in x.items()})
_register_attention("some_zero_tokens", lambda x: {n: t.index_fill(1, _first(t), 0.0) for n, t in x.items()})
_register_attention("key_offset", lambda x: {**x, "key": x["key"] + 6})
_register_attention("large_logits", lambda x: {**x, "query": _huge(x["query"]), "key": _huge(x["key"])})
_register_attention("strided", lambda x: {n: strided(t) for n, t in x.items()})
_register_attention("channels_first", lambda x: {n: t.mT.contiguous().mT for n, t in x.items()})
_register_attention("expanded", lambda x: {n: t[:1].expand(2, -1, -1) for n, t in x.items()})


def _first(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1] // 2, device=x.device)


def _huge(x: Tensor) -> Tensor:
    """`x` with 100 or -100 in the first channel: products near 1e4 or -1e4."""
    huge = x.clone()
    huge[..., 0] = torch.where(x[..., 0] > 0, 100.0, -100.0)
    return huge


@case("memory_attention", "memory_context_attention")
def fixed_cluster(m: Maker) -> dict[str, Any]:
    """The assignment is given; some clusters have no tokens, one holds nearly all."""
    cluster = m.integers(6, 2, 150).clamp_min(3).index_fill(1, torch.arange(100, device=m.device), 1)
    query = m.normal(2, 150, 20)
    inputs = {"query": query, **_bank(m, 6, 10, 20), "cluster": cluster}
    return inputs


CASES["memory_context_attention"]["fixed_cluster"] = lambda m: {
    **_attention(m, 2, 150, 20),
    **{n: t for n, t in fixed_cluster(m).items() if n != "query"},
}


@case("memory_attention")
def every_token_in_last_cluster(m: Maker) -> dict[str, Any]:
    cluster = torch.full((1, 130), 4, device=m.device)
    return {"query": m.normal(1, 130, 9), **_bank(m, 5, 8, 9), "cluster": cluster}


# --- update_memory --------------------------------------------------------------------------------


def _update(m: Maker, k: int | Tensor, *, tokens: int = 60, slots: int = 12, **other: Any) -> dict[str, Any]:
    return {"tokens": m.normal(2, tokens // 2, 10), **_bank(m, 3, slots, 10), "k": k, **other}


case("update_memory", name="k_one")(lambda m: _update(m, 1))
case("update_memory", name="k_all")(lambda m: _update(m, 12))
case("update_memory", name="few_tokens")(lambda m: _update(m, 12, tokens=10))
case("update_memory", name="rate_one")(lambda m: _update(m, 5, rate=1.0))
case("update_memory", name="k_tensor")(lambda m: _update(m, torch.tensor(5, device=m.device)))
case("update_memory", name="k_tensor_low")(lambda m: _update(m, torch.tensor(-3, dtype=torch.int32, device=m.device)))
case("update_memory", name="k_tensor_high")(lambda m: _update(m, torch.tensor(99, device=m.device)))
case("update_memory", name="zero_tokens")(lambda m: {**_update(m, 4), "tokens": torch.zeros_like(m.normal(2, 30, 10))})


@case("update_memory")
def small_clusters(m: Maker) -> dict[str, Any]:
    """Clusters of 1, 2, 7 and no tokens, and one with all others; k does not divide by any."""
    sizes = (1, 2, 7, 0, 40)
    cluster = torch.repeat_interleave(torch.arange(5), torch.tensor(sizes))
    cluster = cluster[torch.randperm(50, generator=m.generator)].view(1, 50).to(m.device)
    return {"tokens": m.normal(1, 50, 10), **_bank(m, 5, 14, 10), "k": 11, "cluster": cluster}


@case("update_memory")
def equal_slots(m: Maker) -> dict[str, Any]:
    """Every slot three times: of equal slots the lower index is written first."""
    inputs = {"tokens": m.normal(2, 80, 37), **_bank(m, 3, 11, 37), "k": 7}
    inputs["memory"] = inputs["memory"].repeat(1, 3, 1)
    return inputs


@case("update_memory")
def large_tokens(m: Maker) -> dict[str, Any]:
    return {**_update(m, 5), "tokens": m.normal(2, 30, 10, scale=3e3)}


@case("update_memory", name="strided")
def strided_update(m: Maker) -> dict[str, Any]:
    inputs = _update(m, 5)
    for name in ("tokens", "memory", "prototypes"):
        inputs[name] = strided(inputs[name])
    return inputs


# --- the Euclidean split --------------------------------------------------------------------------

for _tokens in (1, 2, 3, 4, 31, 196):
    case("split_threshold", name=f"{_tokens}_tokens")(
        lambda m, n=_tokens: {"query": m.normal(2, n, 12), "key": m.normal(2, n, 12)}
    )
case("split_threshold", name="empty_batch")(lambda m: {n: m.normal(0, 5, 12) for n in ("query", "key")})
case("split_threshold", name="zeros")(lambda m: {n: m.normal(2, 9, 12) * 0 for n in ("query", "key")})
case("split_threshold", name="large")(lambda m: {n: m.normal(2, 40, 12, scale=50.0) for n in ("query", "key")})
case("split_threshold", name="strided")(lambda m: {n: strided(m.normal(2, 40, 12)) for n in ("query", "key")})
case("split_threshold", name="key_offset")(lambda m: {"query": m.normal(2, 40, 12), "key": m.normal(2, 40, 12) + 6})


def _split(m: Maker, tokens: int, dim: int, *, batch: int = 2, scale: float = 1.0, **change: Any) -> dict[str, Any]:
    inputs = _attention(m, batch, tokens, dim)
    inputs["query"] = inputs["query"] * scale
    inputs["row_mean"] = m.normal(batch, tokens, dtype=m.bank_dtype, scale=2.0)
    inputs["threshold"] = m.normal(batch, tokens, dtype=m.bank_dtype).abs() + 0.5
    return {**inputs, **change}


for _variant in ("paper", "released"):
    for _name, _arguments in {
        "odd": (37, 19),
        "one_token": (1, 8),
        "two_tokens": (2, 8),
        "small_dim": (33, 3),
        "network": (196, 32),
        "long": (1100, 8),
    }.items():
        case("split_attention", name=f"{_name}_{_variant}")(
            lambda m, a=_arguments, v=_variant: _split(m, *a, batch=1 if a[0] > 1000 else 2, variant=v)
        )
    case("split_attention", name=f"zeros_{_variant}")(
        lambda m, v=_variant: {n: t * 0 for n, t in _split(m, 12, 6).items()} | {"variant": v}
    )
    case("split_attention", name=f"deep_{_variant}")(lambda m, v=_variant: _split(m, 40, 16, scale=-60.0, variant=v))
case("split_attention", name="empty_batch")(lambda m: _split(m, 7, 6, batch=0))
case("split_attention", name="strided")(lambda m: {n: strided(t) for n, t in _split(m, 30, 6).items()})
case("split_attention", name="large_logits")(
    lambda m: _split(m, 30, 6) | {n: _huge(m.normal(2, 30, 6)) for n in ("query", "key")}
)


@case("split_attention")
def exact_zero_scores(m: Maker) -> dict[str, Any]:
    """Some scores are exactly 0 and count as -100."""
    inputs = _split(m, 30, 6)
    inputs["query"] = inputs["query"].index_fill(1, torch.arange(0, 30, 3, device=m.device), 0.0)
    return inputs


# --- windows --------------------------------------------------------------------------------------

for _name, (_shape, _window) in {
    "network": ((2, 24, 14, 14), 7),
    "wide": ((2, 5, 4, 10), 2),
    "one_window": ((1, 3, 5, 5), 5),
    "single_tokens": ((1, 3, 4, 5), 1),
    "empty_batch": ((0, 3, 4, 4), 2),
}.items():
    case("window_similarity", name=_name)(lambda m, s=_shape, w=_window: {"x": m.normal(*s), "window": w})
case("window_similarity", name="zeros")(lambda m: {"x": m.normal(2, 5, 4, 4) * 0, "window": 2})
case("window_similarity", name="tiny")(lambda m: {"x": m.normal(2, 5, 4, 4, scale=1e-7), "window": 2})
case("window_similarity", name="channels_last")(
    lambda m: {"x": m.normal(2, 5, 6, 4).contiguous(memory_format=torch.channels_last), "window": 2}
)
case("window_similarity", name="offset")(lambda m: {"x": m.normal(2, 12, 14, 14) + 3, "window": 7})


def _decay(m: Maker, batch: int, grid: tuple[int, int], window: int, variant: str) -> dict[str, Any]:
    """Whole numbers as scores: many ties."""
    score = m.integers(4, batch, (grid[0] // window) * (grid[1] // window)).to(m.bank_dtype)
    return {"score": score, "grid": grid, "window": window, "gamma": 0.7, "variant": variant, "dtype": m.dtype}


for _variant in ("paper", "released"):
    for _name, (_batch, _grid, _window) in {
        "network": (3, (14, 14), 7),
        "many_windows": (2, (10, 12), 1),
        "oblong": (2, (28, 14), 7),
        "empty_batch": (0, (4, 6), 2),
    }.items():
        case("decay_weights", name=f"{_name}_{_variant}")(
            lambda m, b=_batch, g=_grid, w=_window, v=_variant: _decay(m, b, g, w, v)
        )
case("decay_weights", name="one_window")(lambda m: _decay(m, 2, (5, 5), 5, "paper"))


# --- the loss -------------------------------------------------------------------------------------


def _loss(m: Maker, label: tuple[int, int, int], classes: int, *grids: tuple[int, int], scale: float = 2.0) -> dict:
    heads = [m.normal(label[0], classes, *grid, scale=scale) for grid in grids]
    return {"heads": heads, "label": m.integers(classes, *label)}


case("powerset_loss", name="native")(lambda m: _loss(m, (2, 32, 32), 4, (1, 1), (2, 2), (4, 4), (8, 8)))
case("powerset_loss", name="full_size")(lambda m: _loss(m, (2, 12, 20), 5, *[(12, 20)] * 4))
case("powerset_loss", name="odd")(lambda m: _loss(m, (3, 19, 23), 3, (5, 7), (19, 6), (3, 23), (19, 23)))
case("powerset_loss", name="one_head")(lambda m: _loss(m, (2, 9, 7), 2, (3, 7)))
case("powerset_loss", name="six_heads")(lambda m: _loss(m, (1, 8, 8), 3, *[(4, 4)] * 3, *[(8, 8)] * 3))
case("powerset_loss", name="one_class")(lambda m: _loss(m, (2, 6, 6), 1, (3, 3), (6, 6)))
case("powerset_loss", name="one_pixel")(lambda m: _loss(m, (1, 1, 1), 3, (1, 1), (1, 1)))
case("powerset_loss", name="empty_batch")(lambda m: _loss(m, (0, 6, 6), 3, (3, 3), (6, 6)))
case("powerset_loss", name="many_chunks")(lambda m: _loss(m, (1, 160, 130), 3, (40, 33), (160, 130)))
case("powerset_loss", name="zeros")(lambda m: _loss(m, (2, 6, 6), 3, (3, 3), (6, 6), scale=0.0))
case("powerset_loss", name="large_logits")(lambda m: _loss(m, (2, 12, 12), 4, *[(12, 12)] * 4, scale=1e4))


@case("powerset_loss")
def missing_class(m: Maker) -> dict[str, Any]:
    """A class without a pixel, and one that fills an image."""
    inputs = _loss(m, (2, 16, 16), 4, (4, 4), (8, 8))
    inputs["label"] = inputs["label"].clamp_max(2)
    inputs["label"][0] = 1
    return inputs


@case("powerset_loss", name="channels_last")
def channels_last_heads(m: Maker) -> dict[str, Any]:
    inputs = _loss(m, (2, 16, 16), 4, (4, 4), (8, 8), (16, 16))
    inputs["heads"] = [head.contiguous(memory_format=torch.channels_last) for head in inputs["heads"]]
    inputs["label"] = inputs["label"].mT.contiguous().mT
    return inputs


@case("powerset_loss", name="strided")
def strided_heads(m: Maker) -> dict[str, Any]:
    inputs = _loss(m, (2, 16, 16), 4, (4, 4), (16, 16))
    inputs["heads"] = [strided(head) for head in inputs["heads"]]
    return inputs
