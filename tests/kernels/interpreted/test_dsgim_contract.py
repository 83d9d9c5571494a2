"""Goldens, registration, fake tensors, compilation, autocast, launches and errors of the DS-GIM and loss kernels."""

from __future__ import annotations

import pytest
import torch
from golden_data import golden, relative_error
from no_sync import LargestTensor, NoHostSync
from parity import check_inputs
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from simmp_fast import kernels, reference
from simmp_fast.kernels.powerset_loss.geometry import most_cells, most_tiles
from simmp_fast.kernels.powerset_loss.operators import powerset_gradients, powerset_sums, powerset_terms

OPS = torch.ops.simmp_fast
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])


def tokens(grad: bool = True, count: int = 21, dim: int = 16) -> list[Tensor]:
    torch.manual_seed(0)
    return [(torch.randn(2, count, dim) * 0.5).requires_grad_(grad) for _ in range(3)]


def heads(grad: bool = True) -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(0)
    made = [torch.randn(2, 3, *grid).requires_grad_(grad) for grid in ((2, 3), (5, 6), (10, 12))]
    return made, torch.randint(0, 3, (2, 10, 12))


# --- goldens ----------------------------------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("suffix", ["", "_28x14"])
def test_golden_windows(suffix: str, dtype: torch.dtype) -> None:
    case = golden("window_similarity")
    x, window = case[f"x{suffix}"].to(dtype), int(case["window"])
    score = kernels.window_similarity(x, window)
    assert relative_error(score, case[f"score{suffix}"]) < 8 * torch.finfo(dtype).eps
    grid, similar = x.shape[2:], case[f"similar{suffix}"]
    weights = kernels.decay_weights(score, tuple(grid), window, 0.8, "paper", torch.float32)
    assert torch.equal(weights[..., 0], torch.where(similar.flatten(1), 0.8, 1.0))
    assert torch.equal(weights[..., 1], torch.where(similar.flatten(1), 1.0, 0.8))


@pytest.mark.parametrize("name", ["unit", "large"])
@pytest.mark.parametrize("variant", ["paper", "released"])
@DTYPES
def test_golden_split(name: str, variant: str, dtype: torch.dtype) -> None:
    case = golden(f"split_attention_{name}")
    query, key, value = (case[letter].float() for letter in "qkv")
    row_mean, threshold = kernels.split_threshold(query, key)
    distance = (row_mean.unsqueeze(-1) - row_mean.unsqueeze(-2)).abs()
    far = (distance >= threshold.unsqueeze(-1)) | torch.eye(distance.shape[-1], dtype=torch.bool)
    assert torch.equal(far, case["far"])
    # By the parity rule, which leads to the stored values: the definition matches those to 1e-10 in float64.
    inputs = {n: x.to(dtype) for n, x in (("query", query), ("key", key), ("value", value))}
    inputs |= {"row_mean": row_mean, "threshold": threshold, "variant": variant}
    check_inputs("split_attention", kernels.split_attention, inputs, f"golden {name} {variant}")
    if dtype == torch.float32:
        leaves = [x.requires_grad_() for x in (query, key, value)]
        output = kernels.split_attention(*leaves, row_mean, threshold, variant=variant)
        assert relative_error(output, case[f"out_{variant}"]) < 1e-5
        for letter, gradient in zip("qkv", torch.autograd.grad(output, leaves, case["cotangent"].float()), strict=True):
            assert relative_error(gradient, case[f"d{letter}_{variant}"]) < 3e-5, letter


def test_golden_loss() -> None:
    case = golden("powerset_loss")
    leaves = [case[f"head{i}"].float().requires_grad_() for i in range(4)]
    loss = kernels.powerset_loss(leaves, case["label"])
    assert relative_error(loss, case["loss"]) < 1e-6
    for i, gradient in enumerate(torch.autograd.grad(loss, leaves)):
        assert relative_error(gradient, case[f"dhead{i}"]) < 1e-5, i


# --- the pieces -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["paper", "released"])
@pytest.mark.parametrize(("grid", "window"), [((6, 8), 2), ((14, 7), 7), ((10, 10), 1)])
def test_decay_weights_are_the_definitions(variant: str, grid: tuple[int, int], window: int) -> None:
    count = (grid[0] // window) * (grid[1] // window)
    score = torch.randint(0, 4, (3, count), generator=torch.Generator().manual_seed(0)).float()  # many ties
    expected = reference.decay_weights(score, grid, window, 0.7, variant, torch.float16)
    for given in (score, score.mT.contiguous().mT, score[:0]):
        got = kernels.decay_weights(given, grid, window, 0.7, variant, torch.float16)
        assert torch.equal(got, expected[: len(given)])


@pytest.mark.parametrize("pixels", [1, 5, 16, 33])
def test_tiles_never_touch_more_cells_than_counted(pixels: int) -> None:
    """Against the weights of the definition's resize, for every number of cells and several tiles."""
    for cells in range(1, pixels + 1):
        impulse = torch.eye(cells, dtype=torch.float64).unsqueeze(1)
        weight = torch.nn.functional.interpolate(impulse, pixels, mode="linear")[:, 0].mT
        for tile in (1, 4, 8):
            tiles_over = torch.zeros(cells, dtype=torch.int64)
            for start in range(0, pixels, tile):
                touched = weight[start : start + tile].sum(0).nonzero().flatten()
                assert touched[-1] - touched[0] + 1 <= most_cells(tile, cells, pixels)
                tiles_over[touched] += 1
            assert tiles_over.max() <= most_tiles(tile, cells, pixels)


def test_subset_weights() -> None:
    """The operator weighs single subsets, in the order of their bit masks."""
    (a, b, _), label = heads(False)
    weight = torch.tensor([0.5, 2.0, 1.5])
    loss, coefficients = OPS.powerset_loss([a, b], label, 0.3, 0.7, 1e-5, weight)
    size = label.shape[1:]
    full = [torch.nn.functional.interpolate(h.double(), size, mode="bilinear").requires_grad_() for h in (a, b)]
    terms = [reference.powerset_loss([z], label) for z in (full[0], full[1], full[0] + full[1])]
    expected = sum(w * t for w, t in zip(weight.double(), terms, strict=True))
    assert relative_error(loss, expected.detach()) < 1e-6
    whole = [x.detach().float() for x in full]
    got = OPS.powerset_loss_backward(torch.ones(()), whole, label, coefficients)
    for gradient, right in zip(got, torch.autograd.grad(expected, full), strict=True):
        assert relative_error(gradient, right) < 1e-5


def test_the_parts_of_the_loss() -> None:
    """Sums of two batches add up to those of both, from which each batch gets its share of the gradient."""
    made, label = heads(False)
    loss, coefficients = OPS.powerset_loss(made, label, 0.3, 0.7, 1e-5, None)
    halves = [([head[i : i + 1] for head in made], label[i : i + 1]) for i in range(2)]
    sums = torch.stack([powerset_sums(*half) for half in halves]).sum(0)
    assert sums.isfinite().all()
    found, slopes = powerset_terms(sums, label.numel(), 0.3, 0.7, 1e-5)
    assert relative_error(found, loss) < 1e-6
    assert relative_error(slopes, coefficients) < 1e-6
    whole = OPS.powerset_loss_backward(torch.ones(()), made, label, coefficients)
    shares = [powerset_gradients(torch.ones(()), *half, slopes) for half in halves]
    for gradient, *parts in zip(whole, *shares, strict=True):
        assert relative_error(torch.cat(parts), gradient) < 1e-5


def test_equal_inputs_give_equal_bits() -> None:
    query, key, value = tokens()
    made, label = heads()
    runs = []
    for _ in range(2):
        output = kernels.split_attention(query, key, value, *kernels.split_threshold(query, key))
        loss = kernels.powerset_loss(made, label)
        gradients = torch.autograd.grad(output.sin().sum() + loss, [query, key, value, *made])
        runs.append([output, loss, *gradients])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


# --- registration -----------------------------------------------------------------------------------------------------


def test_opcheck_attention() -> None:
    query, key, value = tokens()
    row_mean, threshold = kernels.split_threshold(query, key)
    plain = [x.detach() for x in (query, key, value)]
    for released in (False, True):
        torch.library.opcheck(OPS.split_attention.default, (query, key, value, row_mean, threshold, released))
    statistics = OPS.split_attention(*plain, row_mean, threshold, False)[1]
    back = (plain[0], *plain, row_mean, threshold, statistics, False)
    torch.library.opcheck(OPS.split_attention_backward.default, back)
    torch.library.opcheck(OPS.split_threshold.default, tuple(plain[:2]))


def test_opcheck_windows() -> None:
    torch.library.opcheck(OPS.window_similarity.default, (torch.randn(2, 5, 4, 6), 2))
    torch.library.opcheck(OPS.decay_weights.default, (torch.randn(2, 6), 4, 6, 2, 0.8, False, torch.float32))


def test_opcheck_loss() -> None:
    made, label = heads()
    torch.library.opcheck(OPS.powerset_loss.default, (made, label, 0.3, 0.7, 1e-5, None))
    plain = [head.detach() for head in made]
    coefficients = OPS.powerset_loss(plain, label, 0.3, 0.7, 1e-5, None)[1]
    torch.library.opcheck(OPS.powerset_loss_backward.default, (torch.tensor(1.5), plain, label, coefficients))


def test_fake_tensors() -> None:
    with FakeTensorMode():
        query = torch.empty(2, 21, 16, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        row_mean, threshold = kernels.split_threshold(query, query)
        assert (row_mean.shape, row_mean.dtype, row_mean.requires_grad) == ((2, 21), torch.float32, False)
        output = kernels.split_attention(query, query, query, row_mean, threshold)
        assert (output.shape, output.dtype, output.device.type) == (query.shape, torch.bfloat16, "cuda")
        score = kernels.window_similarity(torch.empty(2, 3, 4, 6, device="cuda"), 2)
        assert (score.shape, score.dtype) == ((2, 6), torch.float32)
        head = torch.empty(2, 3, 4, 6, device="cuda", dtype=torch.float16)
        loss = kernels.powerset_loss([head], torch.empty(2, 8, 9, device="cuda", dtype=torch.int64))
        assert (loss.shape, loss.dtype) == ((), torch.float32)


def network(x: Tensor, query: Tensor, key: Tensor, value: Tensor, made: list[Tensor], label: Tensor) -> Tensor:
    score = kernels.window_similarity(x, 2)
    weights = kernels.decay_weights(score, (4, 6), 2, 0.8, "paper", x.dtype)
    query = query * weights[..., :1]
    key = key * weights[..., 1:2]
    attended = kernels.split_attention(query, key, value, *kernels.split_threshold(query, key))
    return attended.sin().sum() + kernels.powerset_loss(made, label)


def test_compile_fullgraph() -> None:
    results = []
    for function in (network, torch.compile(network, fullgraph=True, backend="aot_eager")):
        made, label = heads()
        parts = tokens(count=24)
        loss = function(torch.arange(240.0).view(2, 5, 4, 6).sin(), *parts, made, label)
        results.append((loss, *torch.autograd.grad(loss, [*parts, *made])))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=0, atol=0)


def test_autocast() -> None:
    query, key, value = tokens()
    made, label = heads()
    with torch.autocast("cpu", torch.float16):
        row_mean, threshold = kernels.split_threshold(query, key)
        output = kernels.split_attention(query, key, value, row_mean, threshold)
        own = reference.split_attention(query, key, value, row_mean, threshold)
        loss = kernels.powerset_loss(made, label)
        score = kernels.window_similarity(torch.randn(1, 3, 4, 4), 2)
    plain = kernels.split_threshold(query, key)
    assert torch.equal(row_mean, plain[0])
    assert torch.equal(threshold, plain[1])
    assert output.dtype == own.dtype == torch.float16
    torch.testing.assert_close(output, own, rtol=4e-3, atol=4e-3)
    assert loss.dtype == score.dtype == torch.float32
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(output.float().sum(), [query, key, value]))


def test_flops() -> None:
    query, key, value = tokens()
    with FlopCounterMode(display=False) as counter:
        kernels.split_attention(query, key, value, *kernels.split_threshold(query, key)).sum().backward()
    pairs, dim = 2 * 21 * 21, 16
    assert counter.get_total_flops() == 14 * pairs * dim + 3 * 2 * 21 * dim


# --- budgets ----------------------------------------------------------------------------------------------------------


def test_launches(launched: list[str]) -> None:
    """Four kernels forward and two backward in DS-GIM; two (and PyTorch's sum) and two in the loss."""
    query, key, value = tokens()
    made, label = heads()
    score = kernels.window_similarity(torch.randn(1, 3, 4, 4), 2)
    kernels.decay_weights(score, (4, 4), 2, 0.8, "paper", torch.float32)
    output = kernels.split_attention(query, key, value, *kernels.split_threshold(query, key))
    assert len(launched) == 4
    launched.clear()
    output.sum().backward()
    assert len(launched) == 2
    launched.clear()
    loss = kernels.powerset_loss(made, label)
    assert len(launched) == 2
    loss.backward()
    assert len(launched) == 4


def test_no_host_sync_and_no_large_tensor() -> None:
    count = 33
    query, key, value = (x.detach().requires_grad_() for x in tokens(count=count, dim=8))
    with NoHostSync(), LargestTensor() as largest:
        output = kernels.split_attention(query, key, value, *kernels.split_threshold(query, key))
        output.backward(torch.ones_like(output))
    assert largest.elements <= 4 * 2 * count * 8 < 2 * count * count
    made = [torch.randn(1, 9, side, side, requires_grad=True) for side in (1, 2, 4)]
    label = torch.zeros(1, 48, 48, dtype=torch.int64)
    with NoHostSync(), LargestTensor() as largest:
        kernels.powerset_loss(made, label).backward()
    assert largest.elements < 9 * 48 * 48


# --- values and errors ------------------------------------------------------------------------------------------------


def test_padding_is_never_read_as_numbers() -> None:
    """Rows between the images of a slice hold NaN here."""
    parts = tokens(False)
    wide = [torch.full((2, 29, 16), float("nan")) for _ in parts]
    for target, source in zip(wide, parts, strict=True):
        target[:, :21] = source
    sliced = [x[:, :21].requires_grad_() for x in wide]
    split = kernels.split_threshold(*parts[:2])
    assert all(torch.equal(a, b) for a, b in zip(kernels.split_threshold(*sliced[:2]), split, strict=True))
    output = kernels.split_attention(*sliced, *split)
    assert torch.equal(output, kernels.split_attention(*parts, *split))
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(output.sum(), sliced))


def test_errors_name_the_argument() -> None:
    query, key, value = tokens(False)
    made, label = heads(False)
    with pytest.raises(TypeError, match="query: got dtype torch.float64"):
        kernels.split_threshold(query.double(), key.double())
    split = kernels.split_threshold(query, key)
    with pytest.raises(TypeError, match="query: got dtype torch.bfloat16 under TRITON_INTERPRET=1"):
        kernels.split_attention(query.bfloat16(), key.bfloat16(), value.bfloat16(), *split)
    with pytest.raises(TypeError, match="x: got dtype torch.float64"):
        kernels.window_similarity(torch.zeros(1, 2, 4, 4, dtype=torch.float64), 2)
    with pytest.raises(TypeError, match=r"heads\[0\]: got dtype torch.float64"):
        kernels.powerset_loss([h.double() for h in made], label)
    with pytest.raises(ValueError, match=r"heads\[0\]: got 33 classes, expected at most 32"):
        kernels.powerset_loss([torch.zeros(1, 33, 2, 2)], torch.zeros(1, 2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="score: got shape"):
        kernels.decay_weights(torch.zeros(1, 5), (4, 4), 2, 0.8, "paper", torch.float32)
