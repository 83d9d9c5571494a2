"""More inputs for the kernels of DS-GIM and of the loss: channels past a chunk or a group, ties, ragged tiles."""

from __future__ import annotations

from typing import Any

import torch
from parity_cases import CASES, Maker

# Too long for the interpreter; a GPU runs them.
LONG = {("powerset_loss", "many_chunks")}
LONG |= {("split_attention", f"{name}_{variant}") for name in ("long", "network") for variant in ("paper", "released")}


def _split(m: Maker, batch: int, tokens: int, dim: int, variant: str = "paper") -> dict[str, Any]:
    query, key = (m.normal(batch, tokens, dim, scale=dim**-0.25) for _ in range(2))
    return {
        "query": query,
        "key": key,
        "value": m.normal(batch, tokens, dim),
        "row_mean": m.normal(batch, tokens, dtype=m.bank_dtype, scale=2.0),
        "threshold": m.normal(batch, tokens, dtype=m.bank_dtype).abs() + 0.5,
        "variant": variant,
    }


def _key_offset(m: Maker) -> dict[str, Any]:
    inputs = _split(m, 2, 33, 12)
    return {**inputs, "key": inputs["key"] + 6}


def _tie(m: Maker) -> dict[str, Any]:
    """All row means equal and all thresholds 0: every token is far, and the near softmax weighs all by 1/N."""
    inputs = _split(m, 2, 19, 8)
    return {**inputs, "row_mean": inputs["row_mean"] * 0 + 3, "threshold": inputs["threshold"] * 0}


def _deep_all_far(m: Maker) -> dict[str, Any]:
    """Scores far below the fill and no fill in the far softmax: its maximum lies below -100."""
    inputs = _tie(m)
    return {**inputs, "query": inputs["query"].abs() * -40, "key": inputs["key"].abs() + 5}


def _half_split(m: Maker) -> dict[str, Any]:
    """A split in float16 is compared in float16, whatever the dtype of the tokens."""
    inputs = _split(m, 2, 21, 8)
    return {**inputs, **{name: inputs[name].to(torch.float16) for name in ("row_mean", "threshold")}}


def _fused(m: Maker) -> dict[str, Any]:
    """Query, key and value are slices of one projection: rows are three times as far apart."""
    inputs = _split(m, 2, 21, 48)
    parts = torch.cat([inputs[name] for name in ("query", "key", "value")], -1).split(48, -1)
    return {**inputs, **dict(zip(("query", "key", "value"), parts, strict=True))}


def _first_image_released(m: Maker) -> dict[str, Any]:
    """Section 9, row 1: all queries and all keys of the first image are equal."""
    inputs = _split(m, 2, 20, 8, "released")
    for name in ("query", "key"):
        inputs[name][0] = inputs[name][0, :1]
    inputs["row_mean"][0], inputs["threshold"][0] = 1.5, 0.0
    return inputs


def _tied_means(m: Maker) -> dict[str, Any]:
    query = m.normal(2, 24, 6).round()
    query[:, 5:] = query[:, :1]
    return {"query": query, "key": m.normal(2, 24, 6).round()}


def _loss(m: Maker, label: tuple[int, int, int], classes: int, *grids: tuple[int, int]) -> dict[str, Any]:
    return {"heads": [m.normal(label[0], classes, *g, scale=2.0) for g in grids], "label": m.integers(classes, *label)}


def register() -> None:
    """Add the cases to the shared registry."""
    for dim in (17, 64, 65, 200, 256, 384, 400):
        CASES["split_attention"][f"dim_{dim}"] = lambda m, d=dim: _split(m, 1, 18, d)
    for variant in ("paper", "released"):
        CASES["split_attention"][f"tile_and_one_{variant}"] = lambda m, v=variant: _split(m, 2, 65, 8, v)
    CASES["split_attention"] |= {
        "key_offset": _key_offset,
        "tie": _tie,
        "deep_all_far": _deep_all_far,
        "half_split": _half_split,
        "fused": _fused,
        "first_image_released": _first_image_released,
    }
    CASES["split_threshold"]["tied_means"] = _tied_means
    CASES["split_threshold"]["many_tokens"] = lambda m: {n: m.normal(1, 1025, 5) for n in ("query", "key")}
    CASES["split_threshold"]["dim_384"] = lambda m: {n: m.normal(2, 17, 384) for n in ("query", "key")}
    for channels in (1, 129, 600):
        CASES["window_similarity"][f"channels_{channels}"] = lambda m, c=channels: {
            "x": m.normal(1, c, 6, 4),
            "window": 2,
        }
    CASES["window_similarity"]["large_window"] = lambda m: {"x": m.normal(1, 7, 11, 11), "window": 11}
    CASES["window_similarity"]["sliced"] = lambda m: {"x": m.normal(2, 9, 6, 8)[:, ::2, :, 2:6], "window": 2}
    CASES["powerset_loss"]["nearly_full"] = lambda m: _loss(m, (1, 20, 20), 3, (19, 18), (20, 20))
    CASES["powerset_loss"]["classes_17"] = lambda m: _loss(m, (1, 9, 9), 17, (2, 3), (9, 9))
    CASES["powerset_loss"]["widest"] = lambda m: _loss(m, (1, 5, 9), 32, (1, 2), (2, 2), (5, 9), (3, 3), (2, 5), (4, 4))
