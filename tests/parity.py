"""Whether an implementation of an operator agrees with the definition.

The yardstick is the definition in float64. A candidate passes where, for the output and every gradient, its error is at
most twice that of the definition in the candidate's own dtype, plus a floor: in the largest element and in the relative
Frobenius norm. Choices (clusters, slots, tokens) are right if equal, or as good within rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from parity_cases import CASES, build
from torch import Tensor

from simmp_fast import reference

__all__ = ["CASES", "build", "case_names", "check_case", "check_close", "check_inputs", "named_gradients"]

GRADIENTS = {
    "context_attention": ("query", "key", "value"),
    "memory_attention": ("query",),
    "memory_context_attention": ("query", "key", "value"),
    "split_attention": ("query", "key", "value"),
    "powerset_loss": ("heads",),
}
FLOOR = 1e-6
FLOOR_FLOAT64 = 1e-11
# The largest error of few numbers is an accident: cases of at most FEW results are judged by DRAWS draws before
# they fail. One draw in thirty fails where the candidate is the more exact one on average (33 bfloat16 tokens of 3).
FEW, DRAWS = 1000, 8


def case_names(operator: str) -> list[str]:
    """The registered cases of an operator."""
    return sorted(CASES[operator])


# --- the yardstick --------------------------------------------------------------------------------


def _errors(x: Tensor, truth: Tensor) -> tuple[float, float]:
    """The largest error, and the Frobenius norm of the error relative to that of the truth."""
    if truth.numel() == 0:
        return 0.0, 0.0
    difference = x.double() - truth
    norm = truth.norm().item()
    return difference.abs().max().item(), difference.norm().item() / (norm if norm > 0 else 1.0)


def check_close(what: str, got: Tensor, own: Tensor, truth: Tensor, terms: float = 0.0) -> None:
    """Compare `got` with the definition in its own dtype (`own`) and in float64 (`truth`).

    Where the truth is nothing but zeros, terms cancelled that may be as large as `terms`; their rounding is left.
    """
    assert got.shape == truth.shape, f"{what}: got shape {list(got.shape)}, expected {list(truth.shape)}"
    assert got.dtype == own.dtype, f"{what}: got dtype {got.dtype}, expected {own.dtype}"
    assert torch.isfinite(got).all(), f"{what}: {int((~torch.isfinite(got)).sum())} of {got.numel()} are not finite"
    floor = FLOOR_FLOAT64 if got.dtype == torch.float64 else FLOOR
    # Where the truth is 0 by cancellation, a half dtype cannot tell it from its smallest number.
    limits = torch.finfo(got.dtype)
    smallest = limits.smallest_normal * limits.eps
    size = truth.abs().max().item() if truth.numel() else 0.0
    size = size or terms
    for name, mine, yours, least in zip(
        ("largest error", "relative Frobenius error"),
        _errors(got, truth),
        _errors(own, truth),
        (floor * size + smallest, floor + smallest),
        strict=True,
    ):
        allowed = 2 * yours + least
        assert mine <= allowed, (
            f"{what}: {name} {mine:.3e}, allowed {allowed:.3e} "
            f"(the definition in {own.dtype} has {yours:.3e}; largest value {size:.3e})"
        )


# --- running an operator --------------------------------------------------------------------------


def _map(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, list):
        return [_map(v, change) for v in value]
    return change(value) if isinstance(value, Tensor) and value.is_floating_point() else value


def _in_float64(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same values in float64. The split keeps its dtype: it is data, compared as it stands."""
    kept = ("row_mean", "threshold")
    return {name: value if name in kept else _map(value, Tensor.double) for name, value in inputs.items()}


def _leaves(operator: str, inputs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The inputs with gradients switched on, strides kept, and the leaves by name."""
    leaves: dict[str, Tensor] = {}
    inputs = dict(inputs)
    for name in GRADIENTS.get(operator, ()):
        value = inputs[name]
        parts = value if isinstance(value, list) else [value]
        parts = [part.detach().requires_grad_() for part in parts]
        inputs[name] = parts if isinstance(value, list) else parts[0]
        leaves.update({name if len(parts) == 1 else f"{name}[{i}]": part for i, part in enumerate(parts)})
    return inputs, leaves


def named_gradients(
    operator: str, function: Callable[..., Any], inputs: dict[str, Any], *, expand: bool = False, seed: int = 1
) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
    """Run an operator that has gradients: its output, the gradients by name, and the cluster it chose, if any.

    The cotangent depends on `seed` alone; with `expand` it is one number seen as a tensor of strides 0.
    """
    inputs, leaves = _leaves(operator, inputs)
    result = function(**inputs)
    output, cluster = result if isinstance(result, tuple) else (result, None)
    shape = () if expand else output.shape
    cotangent = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    half = torch.float64 if output.dtype == torch.float64 else next(iter(leaves.values())).dtype
    cotangent = cotangent.to(half).to(output.dtype).to(output.device).expand(output.shape)
    gradients = torch.autograd.grad(output, list(leaves.values()), cotangent)
    return output.detach(), dict(zip(leaves, gradients, strict=True)), cluster


# --- the check of a case --------------------------------------------------------------------------


def check_case(
    operator: str,
    candidate: Callable[..., Any],
    name: str,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    *,
    seed: int = 0,
    expand: bool = False,
) -> None:
    """Run `candidate` on a registered case and raise `AssertionError` with a message where it is not right.

    Args:
        operator: name of the operator.
        candidate: the implementation.
        name: name of the case, see `case_names`.
        dtype: of tokens, maps or heads.
        device: where the candidate runs; the definition runs there too.
        seed: of the values.
        expand: give the backward pass a cotangent of strides 0.
    """
    what = f"{operator}[{name}, {dtype}]"
    inputs = build(operator, name, seed=seed, dtype=dtype, device=device)
    try:
        check_inputs(operator, candidate, inputs, what, expand=expand)
    except AssertionError:
        if operator not in GRADIENTS or max(leaf.numel() for leaf in _leaves(operator, inputs)[1].values()) > FEW:
            raise
        seeds = range(seed, seed + DRAWS)
        draws = [build(operator, name, seed=number, dtype=dtype, device=device) for number in seeds]
        _check_gradients(f"{what}, {DRAWS} draws:", operator, candidate, draws, expand)


def check_inputs(
    operator: str, candidate: Callable[..., Any], inputs: dict[str, Any], what: str, *, expand: bool = False
) -> None:
    """Run `candidate` on any inputs and raise `AssertionError`, which begins with `what`, where it is not right."""
    before = {name: _copy(value) for name, value in inputs.items()}
    if operator in GRADIENTS:
        _check_gradients(what, operator, candidate, [inputs], expand)
    else:
        _CHECKS[operator](what, candidate, inputs)
    for argument, value in inputs.items():
        assert _same(value, before[argument]), f"{what}: the operator wrote into its argument {argument}"


def _copy(value: Any) -> Any:
    if isinstance(value, list):
        return [_copy(v) for v in value]
    return value.clone() if isinstance(value, Tensor) else value


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, list):
        return all(map(_same, a, b))
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b


def _check_gradients(
    what: str, operator: str, candidate: Callable[..., Any], draws: Sequence[dict[str, Any]], expand: bool
) -> None:
    """Compare output and gradients of the candidate, over all draws of a case together."""
    found = [_results(what, operator, candidate, inputs, expand) for inputs in draws]
    gradients = (truth for each in found for name, (_, _, truth) in each.items() if name != "output")
    terms = max((float(truth.abs().max()) for truth in gradients if truth.numel()), default=0.0)
    for name in found[0]:
        got, own, truth = (torch.stack(parts) for parts in zip(*(each[name] for each in found), strict=True))
        check_close(f"{what} {name}", got, own, truth, 0.0 if name == "output" else terms)


def _results(
    what: str, operator: str, candidate: Callable[..., Any], inputs: dict[str, Any], expand: bool
) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """The output and every gradient: the candidate's, the definition's in the same dtype, and in float64."""
    output, gradients, cluster = named_gradients(operator, candidate, inputs, expand=expand)
    if cluster is not None:
        fixed = inputs.get("cluster")
        if fixed is None:
            check_assignment(f"{what} cluster", inputs["query"], inputs["prototypes"], cluster, "cosine")
        else:
            assert torch.equal(cluster, fixed), f"{what}: the cluster returned is not the one given"
        inputs = {**inputs, "cluster": cluster}
    definition = getattr(reference, operator)
    own, own_gradients, _ = named_gradients(operator, definition, inputs, expand=expand)
    truth, true_gradients, _ = named_gradients(operator, definition, _in_float64(inputs), expand=expand)
    named = {f"gradient of {name}": (g, own_gradients[name], true_gradients[name]) for name, g in gradients.items()}
    return {"output": (output, own, truth), **named}


def check_assignment(what: str, query: Tensor, prototypes: Tensor, cluster: Tensor, metric: str) -> None:
    """Each chosen prototype is the most similar one, or within rounding of it."""
    assert cluster.dtype == torch.int64, f"{what}: got dtype {cluster.dtype}, expected int64"
    assert cluster.shape == query.shape[:2], f"{what}: got shape {list(cluster.shape)}, expected {query.shape[:2]}"
    tokens, anchors = query.double(), prototypes.double()
    size = tokens.norm(dim=-1) * anchors.norm(dim=-1).amax()
    if metric == "cosine":
        tokens, anchors = (x / x.norm(dim=-1, keepdim=True).clamp_min(1e-8) for x in (tokens, anchors))
        size = torch.ones_like(size)
    similarity = tokens @ anchors.t()
    chosen = similarity.gather(-1, cluster.unsqueeze(-1)).squeeze(-1)
    precision = torch.promote_types(torch.promote_types(query.dtype, prototypes.dtype), torch.float32)
    lost = similarity.amax(-1) - chosen
    allowed = 8 * torch.finfo(precision).eps * size
    worst = int((lost - allowed).argmax()) if lost.numel() else 0
    assert (lost <= allowed).all(), (
        f"{what}: {int((lost > allowed).sum())} of {lost.numel()} tokens are not in their best cluster; token {worst} "
        f"loses {lost.flatten()[worst].item():.3e}, rounding explains {allowed.flatten()[worst].item():.3e}"
    )


def _check_assign(what: str, candidate: Callable[..., Any], inputs: dict[str, Any]) -> None:
    check_assignment(what, inputs["query"], inputs["prototypes"], candidate(**inputs), inputs["metric"])


def _check_window(what: str, candidate: Callable[..., Any], inputs: dict[str, Any]) -> None:
    own, truth = reference.window_similarity(**inputs), reference.window_similarity(**_in_float64(inputs))
    check_close(f"{what} score", candidate(**inputs), own, truth)


def _check_decay(what: str, candidate: Callable[..., Any], inputs: dict[str, Any]) -> None:
    """A choice among given scores: it must be the definition's to the last bit."""
    got, own = candidate(**inputs), reference.decay_weights(**inputs)
    assert (got.dtype, got.shape) == (own.dtype, own.shape), f"{what}: got {got.dtype} {list(got.shape)}"
    assert torch.equal(got, own), f"{what}: {int((got != own).sum())} of {own.numel()} weights differ"


def _check_threshold(what: str, candidate: Callable[..., Any], inputs: dict[str, Any]) -> None:
    """The row means by the yardstick; the threshold must be the exact order statistic of the candidate's own means."""
    row_mean, threshold = candidate(**inputs)
    own, truth = reference.split_threshold(**inputs)[0], reference.split_threshold(**_in_float64(inputs))[0]
    check_close(f"{what} row_mean", row_mean, own, truth)
    distance = (row_mean.unsqueeze(-1) - row_mean.unsqueeze(-2)).abs()
    rank = max(1, row_mean.shape[1] // 2)
    exact = distance.sort(-1, descending=True).values[..., rank - 1]
    wrong = int((threshold != exact).sum())
    assert wrong == 0, f"{what}: {wrong} of {exact.numel()} thresholds are not the {rank}-th largest |r_i - r_j|"


# --- the update of the bank -----------------------------------------------------------------------


def _check_update(what: str, candidate: Callable[..., Any], inputs: dict[str, Any]) -> None:
    memory, prototypes = candidate(**inputs)
    if inputs.get("cluster") is None:
        # In float64: under TF32 the definition's own products would send tokens elsewhere.
        chosen = reference.assign_clusters(inputs["tokens"].double(), inputs["prototypes"].double(), metric="dot")
        inputs = {**inputs, "cluster": chosen}
    own, _ = reference.update_memory(**inputs)
    truth, _ = reference.update_memory(**_in_float64(inputs))
    assert memory.dtype == own.dtype, f"{what}: got dtype {memory.dtype}, expected {own.dtype}"
    assert memory.shape == own.shape, f"{what}: got shape {list(memory.shape)}, expected {list(own.shape)}"
    assert torch.isfinite(memory).all(), f"{what}: the bank is not finite"
    mean = memory.double().mean(1)
    check_close(f"{what} prototypes", prototypes, mean.to(memory.dtype), mean)
    for c in range(memory.shape[0]):
        try:
            check_close(f"{what} cluster {c}", memory[c], own[c], truth[c])
        except AssertionError as difference:
            _check_written(f"{what} cluster {c}", memory[c], inputs, c, str(difference))


def _check_written(what: str, got: Tensor, inputs: dict[str, Any], c: int, difference: str) -> None:
    """A bank that differs from the definition's is right where only near-ties were decided in another way.

    Finds the token written over each slot, then asks that slot and token hold ranks that their scores allow.
    """
    rate, before = inputs.get("rate", 0.3), inputs["memory"][c]
    tokens = inputs["tokens"].flatten(0, 1)[inputs["cluster"].flatten() == c].double()
    width = min(max(int(inputs["k"]), 1), len(before))
    if len(tokens) < width:
        tokens = tokens[torch.arange(width, device=tokens.device) % max(len(tokens), 1)]
    slot_score = before.double().softmax(0).sum(-1)
    token_score = tokens.softmax(0).sum(-1)
    slack = 1e-11 if got.dtype == torch.float64 else 2e-5
    rising, falling = slot_score.sort().values, token_score.sort(descending=True).values[:width]

    written = (got != before).any(-1).nonzero().flatten().tolist()
    assert len(written) == width, f"{what}: wrote {len(written)} slots, expected {width}. {difference}"
    for slot in written:
        value = (got[slot].double() - (1 - rate) * before[slot].double()) / rate
        distance = (tokens - value).abs().amax(-1)
        token = int(distance.argmin())
        size = max(tokens.abs().max().item(), before.abs().max().item(), 1e-30)
        assert distance[token] <= slack * size / rate, (
            f"{what}: slot {slot} holds no mixture with a token. {difference}"
        )
        near = slack * slot_score[slot].abs()
        ranks = ((rising[:width] - slot_score[slot]).abs() <= near).nonzero().flatten()
        assert len(ranks), f"{what}: slot {slot} is not among the {width} lowest. {difference}"
        gap = (falling[ranks] - token_score[token]).abs().min()
        assert gap <= slack * token_score[token].abs(), f"{what}: slot {slot} got a token of another rank. {difference}"
        twins = [m for m in range(slot) if torch.equal(before[m], before[slot])]
        assert all(m in written for m in twins), (
            f"{what}: slot {slot} was written before its equal {twins}. {difference}"
        )


_CHECKS: dict[str, Callable[[str, Callable[..., Any], dict[str, Any]], None]] = {
    "assign_clusters": _check_assign,
    "window_similarity": _check_window,
    "decay_weights": _check_decay,
    "split_threshold": _check_threshold,
    "update_memory": _check_update,
}
