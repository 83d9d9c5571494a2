"""The portable operators against outputs and gradients of the released code, in float64."""

from __future__ import annotations

import pytest
import torch
from golden_data import golden, relative_error

from simmp_fast import portable

TOLERANCE = 1e-10


@pytest.mark.parametrize("name", ["a", "b"])
@pytest.mark.parametrize("warmup", [True, False], ids=["warmup", "structured"])
def test_dmwla_forward_and_gradients(name: str, warmup: bool) -> None:
    case = golden(f"dmwla_warmup_{name}" if warmup else f"dmwla_{name}")
    parameters = {n: case[n].clone().requires_grad_() for n in ("x", "theta", "phi", "g", "o")}
    x = parameters["x"]
    tokens = x.flatten(2).mT
    query, key, value = (tokens @ parameters[n].T for n in ("theta", "phi", "g"))
    if warmup:
        attended = portable.context_attention(query, key, value)
    else:
        attended, cluster = portable.memory_context_attention(query, key, value, case["memory"], case["prototypes"])
        assert torch.equal(cluster, case["cluster"])
    y = x + (attended @ parameters["o"].T).mT.reshape(x.shape)
    assert relative_error(y, case["y"]) < TOLERANCE
    gradients = torch.autograd.grad(y, list(parameters.values()), case["cotangent"])
    for parameter, gradient in zip(parameters, gradients, strict=True):
        assert relative_error(gradient, case[f"d{parameter}"]) < TOLERANCE, parameter


@pytest.mark.parametrize("name", ["a", "b", "small"])
@pytest.mark.parametrize("device_k", [False, True])
def test_memory_update(name: str, device_k: bool) -> None:
    case = golden("memory_update_small_clusters" if name == "small" else f"dmwla_{name}")
    tokens = case["tokens"].unsqueeze(0) if name == "small" else case["x"].flatten(2).mT @ case["phi_k"].T
    k = case["k"] if device_k else int(case["k"])
    memory, prototypes = portable.update_memory(tokens, case["memory"], case["prototypes"], k, rate=float(case["rate"]))
    assert relative_error(memory, case["memory_after"]) < TOLERANCE
    assert relative_error(prototypes, case["prototypes_after"]) < TOLERANCE


@pytest.mark.parametrize("suffix", ["", "_28x14"])
def test_window_similarity(suffix: str) -> None:
    case = golden("window_similarity")
    score = portable.window_similarity(case[f"x{suffix}"], int(case["window"]))
    assert relative_error(score, case[f"score{suffix}"]) < TOLERANCE


@pytest.mark.parametrize("name", ["unit", "large"])
@pytest.mark.parametrize("variant", ["paper", "released"])
@pytest.mark.parametrize("chunked", [False, True])
def test_split(name: str, variant: str, chunked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if chunked:
        module = __import__("sys").modules["simmp_fast.portable.split_attention"]
        monkeypatch.setattr(module, "DIRECT_UP_TO", 0)
        monkeypatch.setattr(module, "CHUNK_SCORES", 0)
    case = golden(f"split_attention_{name}")
    row_mean, threshold = portable.split_threshold(case["q"], case["k"])
    assert relative_error(row_mean, case["row_mean"]) < TOLERANCE
    assert relative_error(threshold, case["threshold"]) < TOLERANCE
    far = (row_mean.unsqueeze(-1) - row_mean.unsqueeze(-2)).abs() >= threshold.unsqueeze(-1)
    assert torch.equal(far | torch.eye(far.shape[-1], dtype=torch.bool), case["far"])
    inputs = [case[letter].clone().requires_grad_() for letter in "qkv"]
    output = portable.split_attention(*inputs, row_mean, threshold, variant=variant)
    assert relative_error(output, case[f"out_{variant}"]) < TOLERANCE
    for letter, gradient in zip("qkv", torch.autograd.grad(output, inputs, case["cotangent"]), strict=True):
        assert relative_error(gradient, case[f"d{letter}_{variant}"]) < TOLERANCE, letter


def test_powerset_loss() -> None:
    case = golden("powerset_loss")
    heads = [case[f"head{i}"].clone().requires_grad_() for i in range(4)]
    loss = portable.powerset_loss(heads, case["label"])
    assert relative_error(loss, case["loss"]) < TOLERANCE
    for i, gradient in enumerate(torch.autograd.grad(loss, heads)):
        assert relative_error(gradient, case[f"dhead{i}"]) < TOLERANCE, i
