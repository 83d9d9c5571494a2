"""Bytes and operations of every operator: what it has to move and compute, however it is written.

Bytes: each input read once, each output written once, nothing in between (`update_memory` reads its tokens twice: the
softmax over a cluster's tokens needs its sum before the first score). Operations: two per multiply-add of a product;
others count only where there is no product. They are those that the kernels register with PyTorch's FLOP counter. A
backward pass recomputes scores, as any form that is linear in memory must: five products for the two of attention.

`s` are the sizes by name, `e` the bytes of an element of the tokens; banks, weights and row means are float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

Sizes = Mapping[str, int]


@dataclass(frozen=True)
class Cost:
    """Bytes and operations of one call."""

    bytes: int
    flops: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.bytes + other.bytes, self.flops + other.flops)


@dataclass(frozen=True)
class Formula:
    """Cost of the forward pass and, where there is one, of the backward pass."""

    forward: Callable[[Sizes, int], Cost]
    backward: Callable[[Sizes, int], Cost] | None = None

    def of(self, direction: str, sizes: Sizes, element: int) -> Cost:
        """The cost of a direction: "forward", "backward", or "both" for their sum."""
        if direction == "forward" or self.backward is None:
            return self.forward(sizes, element)
        backward = self.backward(sizes, element)
        return backward if direction == "backward" else self.forward(sizes, element) + backward


def _tokens(s: Sizes, width: str = "D") -> int:
    return s["B"] * s["N"] * s[width]


def _bank(s: Sizes) -> int:
    return 4 * s["K"] * s["D"] * (s["M"] + 1)


def _attention(s: Sizes, width: str = "D") -> int:
    """Operations of one ``[N, N]`` product."""
    return 2 * s["B"] * s["N"] ** 2 * s[width]


def _assign(s: Sizes, e: int) -> Cost:
    return Cost(e * _tokens(s) + 4 * s["K"] * s["D"] + 8 * s["B"] * s["N"], 2 * s["K"] * _tokens(s))


def _context_forward(s: Sizes, e: int) -> Cost:
    return Cost(4 * e * _tokens(s), 2 * _attention(s))


def _context_backward(s: Sizes, e: int) -> Cost:
    return Cost(8 * e * _tokens(s), 5 * _attention(s))


def _memory_forward(s: Sizes, e: int) -> Cost:
    moved = 2 * e * _tokens(s) + _bank(s) + 8 * s["B"] * s["N"]
    return Cost(moved, 2 * s["K"] * _tokens(s) + 4 * s["M"] * _tokens(s))


def _memory_backward(s: Sizes, e: int) -> Cost:
    return Cost(3 * e * _tokens(s) + _bank(s) + 8 * s["B"] * s["N"], 6 * s["M"] * _tokens(s))


def _joint_forward(s: Sizes, e: int) -> Cost:
    moved = 4 * e * _tokens(s) + _bank(s) + 8 * s["B"] * s["N"]
    return Cost(moved, _context_forward(s, e).flops + _memory_forward(s, e).flops)


def _joint_backward(s: Sizes, e: int) -> Cost:
    moved = 8 * e * _tokens(s) + _bank(s) + 8 * s["B"] * s["N"]
    return Cost(moved, _context_backward(s, e).flops + _memory_backward(s, e).flops)


def _update(s: Sizes, e: int) -> Cost:
    return Cost(2 * e * _tokens(s) + 2 * _bank(s), 2 * s["K"] * _tokens(s))


def _window(s: Sizes, e: int) -> Cost:
    values = s["B"] * s["C"] * s["H"] * s["W"]
    windows = s["B"] * (s["H"] // s["window"]) * (s["W"] // s["window"])
    return Cost(e * values + 4 * windows, 4 * values)


def _decay(s: Sizes, e: int) -> Cost:
    """Scores read, three weights a token written; every token's window is compared with all windows."""
    windows, tokens = (s["H"] // s["window"]) * (s["W"] // s["window"]), s["H"] * s["W"]
    return Cost(s["B"] * (4 * windows + 3 * e * tokens), s["B"] * tokens * windows)


def _threshold(s: Sizes, e: int) -> Cost:
    return Cost(2 * e * _tokens(s, "C") + 8 * s["B"] * s["N"], 3 * _tokens(s, "C"))


def _split_forward(s: Sizes, e: int) -> Cost:
    return Cost(4 * e * _tokens(s, "C") + 8 * s["B"] * s["N"], 2 * _attention(s, "C"))


def _split_backward(s: Sizes, e: int) -> Cost:
    return Cost(8 * e * _tokens(s, "C") + 8 * s["B"] * s["N"], 5 * _attention(s, "C"))


SUBSETS = 15


def head_sides(s: Sizes) -> list[int]:
    """Sides of the four heads, coarsest first; the finest is ``grid``."""
    return [max(1, s["grid"] // 2**i) for i in (3, 2, 1, 0)]


def _loss_forward(s: Sizes, e: int) -> Cost:
    heads = s["B"] * s["classes"] * sum(side**2 for side in head_sides(s))
    pixels = s["B"] * s["side"] ** 2
    # About ten operations for each logit of each subset: its share of resizing and sums, softmax, Dice.
    return Cost(e * heads + 8 * pixels, 10 * pixels * s["classes"] * SUBSETS)


def _loss_backward(s: Sizes, e: int) -> Cost:
    forward = _loss_forward(s, e)
    heads = s["B"] * s["classes"] * sum(side**2 for side in head_sides(s))
    return Cost(forward.bytes + e * heads, 2 * forward.flops)


def _block_forward(s: Sizes, e: int) -> Cost:
    """Of the two ways to write the context the one with fewer operations: in D or, reassociated, in C dimensions."""
    tokens, c, d = s["B"] * s["N"], s["C"], s["D"]
    shared = 2 * tokens * c * d * 3 + _memory_forward(s, e).flops  # query, momentum key, output
    plain = 2 * tokens * c * d * 2 + 2 * _attention(s)
    reassociated = 4 * c * c * d + 2 * tokens * c * c * 2 + 2 * _attention(s, "C")
    return Cost(2 * e * tokens * c + 5 * 4 * c * d + _bank(s), shared + min(plain, reassociated))


def _block_backward(s: Sizes, e: int) -> Cost:
    tokens, c, d = s["B"] * s["N"], s["C"], s["D"]
    shared = 4 * tokens * c * d * 2 + _memory_backward(s, e).flops
    plain = 4 * tokens * c * d * 2 + 5 * _attention(s)
    reassociated = 8 * c * c * d + 4 * tokens * c * c * 2 + 5 * _attention(s, "C")
    return Cost(3 * e * tokens * c + 8 * 4 * c * d + _bank(s), shared + min(plain, reassociated))


def _dsgim_weights(s: Sizes) -> int:
    """Four C x C projections and the two 3x3 convolutions between C and C/4."""
    return 4 * s["C"] ** 2 + 2 * 9 * s["C"] * max(1, s["C"] // 4)


def _dsgim_sizes(s: Sizes) -> dict[str, int]:
    return {**s, "N": s["H"] * s["W"]}


def _dsgim_forward(s: Sizes, e: int) -> Cost:
    s = _dsgim_sizes(s)
    flops = 2 * s["B"] * s["N"] * _dsgim_weights(s) + 2 * _attention(s, "C")
    return Cost(2 * e * _tokens(s, "C") + 4 * _dsgim_weights(s), flops)


def _dsgim_backward(s: Sizes, e: int) -> Cost:
    s = _dsgim_sizes(s)
    flops = 4 * s["B"] * s["N"] * _dsgim_weights(s) + 5 * _attention(s, "C")
    return Cost(3 * e * _tokens(s, "C") + 8 * _dsgim_weights(s), flops)


FORMULAS: dict[str, Formula] = {
    "assign_clusters": Formula(_assign),
    "context_attention": Formula(_context_forward, _context_backward),
    "memory_attention": Formula(_memory_forward, _memory_backward),
    "memory_context_attention": Formula(_joint_forward, _joint_backward),
    "update_memory": Formula(_update),
    "window_similarity": Formula(_window),
    "decay_weights": Formula(_decay),
    "split_threshold": Formula(_threshold),
    "split_attention": Formula(_split_forward, _split_backward),
    "powerset_loss": Formula(_loss_forward, _loss_backward),
    "dmwla_block": Formula(_block_forward, _block_backward),
    "dsgim": Formula(_dsgim_forward, _dsgim_backward),
}
