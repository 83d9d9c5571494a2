"""The reference operators against outputs and gradients of the released code, in float64."""

from __future__ import annotations

import pytest
import torch
from golden_data import golden, relative_error
from torch import Tensor

from simmp_fast import reference

TOLERANCE = 1e-10


def dmwla_block(case: dict[str, Tensor], *, warmup: bool) -> tuple[dict[str, Tensor], Tensor, Tensor | None]:
    """Section 2 spelled out with the operators: the parameters, the block's output, the clusters."""
    parameters = {name: case[name].clone().requires_grad_() for name in ("x", "theta", "phi", "g", "o")}
    x = parameters["x"]
    tokens = x.flatten(2).transpose(1, 2)
    query, key, value = (tokens @ parameters[name].T for name in ("theta", "phi", "g"))
    cluster = None
    if warmup:
        attended = reference.context_attention(query, key, value)
    else:
        attended, cluster = reference.memory_context_attention(query, key, value, case["memory"], case["prototypes"])
    return parameters, x + (attended @ parameters["o"].T).transpose(1, 2).reshape(x.shape), cluster


@pytest.mark.parametrize("name", ["a", "b"])
@pytest.mark.parametrize("warmup", [True, False], ids=["warmup", "structured"])
def test_dmwla_forward_and_gradients(name: str, warmup: bool) -> None:
    case = golden(f"dmwla_warmup_{name}" if warmup else f"dmwla_{name}")
    parameters, y, cluster = dmwla_block(case, warmup=warmup)
    assert relative_error(y, case["y"]) < TOLERANCE
    if not warmup:
        assert torch.equal(cluster, case["cluster"])
    gradients = torch.autograd.grad(y, list(parameters.values()), case["cotangent"])
    for parameter, gradient in zip(parameters, gradients, strict=True):
        assert relative_error(gradient, case[f"d{parameter}"]) < TOLERANCE, parameter


@pytest.mark.parametrize("name", ["a", "b"])
@pytest.mark.parametrize("device_k", [False, True])
def test_memory_update(name: str, device_k: bool) -> None:
    case = golden(f"dmwla_{name}")
    tokens = case["x"].flatten(2).transpose(1, 2) @ case["phi_k"].T
    k = case["k"] if device_k else int(case["k"])
    memory, prototypes = reference.update_memory(
        tokens, case["memory"], case["prototypes"], k, rate=float(case["rate"])
    )
    assert relative_error(memory, case["memory_after"]) < TOLERANCE
    assert relative_error(prototypes, case["prototypes_after"]) < TOLERANCE


def test_memory_update_with_few_tokens_and_an_empty_cluster() -> None:
    case = golden("memory_update_small_clusters")
    tokens = case["tokens"].unsqueeze(0)
    memory, prototypes = reference.update_memory(tokens, case["memory"], case["prototypes"], int(case["k"]))
    assert relative_error(memory, case["memory_after"]) < TOLERANCE
    assert relative_error(prototypes, case["prototypes_after"]) < TOLERANCE
    owners = reference.assign_clusters(tokens, case["prototypes"], metric="dot")
    counts = owners.flatten().bincount(minlength=len(case["prototypes"]))
    assert 0 in counts, "the case is meant to hold an empty cluster"
    assert ((counts > 0) & (counts < case["k"])).any(), "the case is meant to hold a cluster with n_c < k"


@pytest.mark.parametrize("suffix", ["", "_28x14"])
def test_window_similarity(suffix: str) -> None:
    case = golden("window_similarity")
    score = reference.window_similarity(case[f"x{suffix}"], int(case["window"]))
    assert relative_error(score, case[f"score{suffix}"]) < TOLERANCE


@pytest.mark.parametrize("name", ["unit", "large"])
def test_split_threshold_and_far_set(name: str) -> None:
    case = golden(f"split_attention_{name}")
    row_mean, threshold = reference.split_threshold(case["q"], case["k"])
    assert relative_error(row_mean, case["row_mean"]) < TOLERANCE
    assert relative_error(threshold, case["threshold"]) < TOLERANCE
    distance = (row_mean.unsqueeze(-1) - row_mean.unsqueeze(-2)).abs()
    far = (distance >= threshold.unsqueeze(-1)) | torch.eye(distance.shape[-1], dtype=torch.bool)
    assert torch.equal(far, case["far"])


@pytest.mark.parametrize("name", ["unit", "large"])
@pytest.mark.parametrize("variant", ["paper", "released"])
def test_split_attention(name: str, variant: str) -> None:
    case = golden(f"split_attention_{name}")
    row_mean, threshold = reference.split_threshold(case["q"], case["k"])
    inputs = [case[letter].clone().requires_grad_() for letter in "qkv"]
    output = reference.split_attention(*inputs, row_mean, threshold, variant=variant)
    assert relative_error(output, case[f"out_{variant}"]) < TOLERANCE
    for letter, gradient in zip("qkv", torch.autograd.grad(output, inputs, case["cotangent"]), strict=True):
        assert relative_error(gradient, case[f"d{letter}_{variant}"]) < TOLERANCE, letter


def test_powerset_loss() -> None:
    case = golden("powerset_loss")
    heads = [case[f"head{i}"].clone().requires_grad_() for i in range(4)]
    loss = reference.powerset_loss(heads, case["label"])
    assert relative_error(loss, case["loss"]) < TOLERANCE
    for i, gradient in enumerate(torch.autograd.grad(loss, heads)):
        assert relative_error(gradient, case[f"dhead{i}"]) < TOLERANCE, i
