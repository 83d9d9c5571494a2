"""Context attention at the network's own lengths, where sums are long enough for the order of adding to show."""

from __future__ import annotations

import parity
import pytest
import torch

from simmp_fast import portable


@pytest.mark.parametrize(("length", "dim"), [(784, 128), (784, 192), (3136, 96), (3136, 256)])
def test_parity_of_context_attention(length: int, dim: int) -> None:
    """Scores have unit variance; the seed is one whose largest gradient row catches a sum taken in one run."""
    generator = torch.Generator().manual_seed(2222)
    scales = {"query": dim**-0.25, "key": dim**-0.25, "value": 1.0}
    inputs = {name: torch.randn((1, length, dim), generator=generator) * scale for name, scale in scales.items()}
    parity.check_inputs("context_attention", portable.context_attention, inputs, f"N={length}, D={dim}")


@pytest.mark.parametrize("length", [4, 500])
def test_parity_where_scores_are_large(length: int) -> None:
    """Scores of several hundred, as the unscaled attention of a network meets them."""
    generator = torch.Generator().manual_seed(0)
    inputs = {name: torch.randn((2, length, 32), generator=generator) for name in ("query", "key", "value")}
    inputs["query"] *= 100
    parity.check_inputs("context_attention", portable.context_attention, inputs, f"N={length}, large scores")
