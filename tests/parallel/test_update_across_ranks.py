"""The memory update of several ranks is that of one process on the concatenated batch."""

from __future__ import annotations

import processes
import pytest
import torch
from torch import Tensor

from simmp_fast import ops
from simmp_fast.parallel.update_memory import update_memory
from simmp_fast.ranks import Ranks

CLUSTERS, SLOTS, DIM = 4, 6, 5


def updated(ranks: Ranks, cases: list[tuple[list[Tensor], Tensor, Tensor, int | Tensor]]) -> list[Tensor]:
    """Each case's memory and prototypes after the update, with the tokens of this rank."""
    results: list[Tensor] = []
    for shares, memory, prototypes, k in cases:
        results += update_memory(shares[ranks.rank], memory, prototypes, k, backend="portable", ranks=ranks)
    return results


def bank(generator: torch.Generator, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    memory = torch.rand(CLUSTERS, SLOTS, DIM, generator=generator, dtype=torch.float64)
    memory[1, 3:] = memory[1, 0]  # equal slots, as structuring leaves them
    return memory.to(dtype), torch.eye(CLUSTERS, DIM).to(dtype)


def tokens_of(owners: list[list[int]], generator: torch.Generator, dtype: torch.dtype) -> list[Tensor]:
    """For each rank ``[B, N, D]``: tokens that match the named clusters, two an image."""
    shares = []
    for owner in owners:
        tokens = 0.3 * torch.randn(len(owner), DIM, generator=generator, dtype=torch.float64)
        tokens += 4 * torch.eye(CLUSTERS, DIM, dtype=torch.float64)[owner]
        shares.append(tokens.to(dtype).view(-1, 2, DIM))
    return shares


# Clusters of the tokens of three ranks. With two, the last rank's tokens are not there.
OWNERS = {
    "many": [[c % 4 for c in range(40)], [c % 3 for c in range(40)], [0, 3] * 20],
    "fewer than k": [[0, 0, 1, 1], [0, 1, 1, 2], [2, 2, 2, 3]],
    "one each": [[0, 1], [1, 2], [2, 0]],
    "only one rank has them": [[0, 0, 0, 0], [1, 1, 1, 1], [1, 1, 3, 3]],
    "a rank without tokens": [[], [0, 1, 1, 2] * 5, [2, 2]],
    "the last rank without tokens": [[0, 1, 1, 2] * 5, [], []],
}


def make_cases(size: int, dtype: torch.dtype) -> list[tuple[list[Tensor], Tensor, Tensor, int | Tensor]]:
    cases: list[tuple[list[Tensor], Tensor, Tensor, int | Tensor]] = []
    for seed, owners in enumerate(OWNERS.values()):
        for k in (1, 4, torch.tensor(5), torch.tensor(99)):
            generator = torch.Generator().manual_seed(seed)
            cases.append((tokens_of(owners[:size], generator, dtype), *bank(generator, dtype), k))
    return cases


@pytest.mark.parametrize("size", [2, 3])
def test_equal_to_one_process(size: int) -> None:
    cases = make_cases(size, torch.float64)
    got = processes.together(updated, size, cases)
    for i, (shares, memory, prototypes, k) in enumerate(cases):
        for backend in ("reference", "portable"):
            expected = ops.update_memory(torch.cat(shares), memory, prototypes, k, backend=backend)
            torch.testing.assert_close(got[2 * i], expected[0], rtol=0, atol=1e-13)
            torch.testing.assert_close(got[2 * i + 1], expected[1], rtol=0, atol=1e-13)
        assert not torch.equal(got[2 * i], memory)


def tie_case() -> tuple[list[Tensor], Tensor, Tensor, int]:
    """Tokens of equal scores: each has one of two mirrored vectors, and both channels have the same sums."""
    one, other = [1.0, 3.0], [3.0, 1.0]
    shares = [torch.tensor([[one, other]]), torch.tensor([[other, one]]), torch.tensor([[one, one], [other, other]])]
    memory = torch.arange(12, dtype=torch.float64).view(1, 6, 2) / 16
    return [share.double() for share in shares], memory, torch.ones(1, 2, dtype=torch.float64), 3


@pytest.mark.parametrize("size", [2, 3])
def test_ties_go_to_the_lower_token_of_the_concatenated_batch(size: int) -> None:
    shares, memory, prototypes, k = tie_case()
    shares = shares[:size]
    got = processes.together(updated, size, [(shares, memory, prototypes, k)])
    expected = 0.7 * memory[0, :3] + 0.3 * torch.cat(shares).view(-1, 2)[:3]
    torch.testing.assert_close(got[0][0, :3], expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(got[0][0, 3:], memory[0, 3:], rtol=0, atol=0)


def test_half_precision_tokens_in_a_float32_bank() -> None:
    shares, memory, prototypes, k = make_cases(2, torch.float32)[1]
    shares = [share.bfloat16() for share in shares]
    got = processes.together(updated, 2, [(shares, memory, prototypes, k)])
    expected = ops.update_memory(torch.cat(shares), memory, prototypes, k, backend="portable")
    assert got[0].dtype == torch.float32
    torch.testing.assert_close(got[0], expected[0], rtol=0, atol=1e-6)


def test_alone_it_is_the_plain_operator() -> None:
    shares, memory, prototypes, k = make_cases(2, torch.float32)[0]
    got = processes.alone(updated, [(shares, memory, prototypes, k)])
    expected = ops.update_memory(shares[0], memory, prototypes, k, backend="portable")
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_arguments_are_checked() -> None:
    shares, memory, prototypes, _ = make_cases(2, torch.float32)[0]
    with pytest.raises(ValueError, match=r"k: got 7, expected 1 to 6"):
        update_memory(shares[0], memory, prototypes, 7, ranks=Ranks(0, 2))
