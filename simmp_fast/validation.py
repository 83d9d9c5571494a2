"""What every implementation of an operator shares: checks of its arguments (name, what it got, what it needs), what
autocast makes of its products, what an index outside of its range comes to, and who looks into a call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@torch.compiler.assume_constant_result
def has_autocast(kind: str) -> bool:
    """Whether autocast knows this kind of device: the meta device, for one, it does not.

    A constant to `torch.compile`, whose tracer cannot follow the question in PyTorch 2.11.
    """
    return torch.amp.is_autocast_available(kind)


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a product of `x` is taken: that of autocast where it is on and `x` is not float64."""
    kind = x.device.type
    if x.dtype != torch.float64 and has_autocast(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


def transformed() -> bool:
    """Whether `torch.func` or forward-mode AD is at work: neither sees into an operator that is registered as one.

    A forward-mode derivative of such an operator would be 0, without a word.
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def within(index: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Indices that can be followed, and which of them were in ``[0, count)`` to begin with.

    An index outside makes a result NaN, in every implementation and on every device: it cannot be an error, since a GPU
    would have to be waited for to see it.
    """
    return index.clamp(0, count - 1), (index >= 0) & (index < count)


def nan_unless(known: Tensor, like: Tensor) -> Tensor:
    """1 where `known`, NaN elsewhere, in the dtype of `like`: a factor that spoils a result and its gradient."""
    return torch.where(known, 1.0, torch.nan).to(like.dtype)


def spoiled(attended: Tensor, query: Tensor, known: Tensor) -> Tensor:
    """`attended` with NaN for the tokens that are not `known`, also in the gradient of their `query`, and no other."""
    return attended + (query * (nan_unless(known, query) - 1).unsqueeze(-1)).to(attended.dtype)


def _shape_text(sizes: Sequence[int | str]) -> str:
    return "[" + ", ".join(str(s) for s in sizes) + "]"


def check_tensor(name: str, value: object) -> None:
    """Raise `TypeError` unless `value` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a torch.Tensor")


def _pattern_text(axes: Sequence[str], sizes: Mapping[str, int]) -> str:
    return _shape_text([f"{a}={sizes[a]}" if a in sizes else a for a in axes])


def check_shape(name: str, value: object, pattern: str, **sizes: int) -> dict[str, int]:
    """Check `value` against a shape pattern such as ``"B N D"`` and return the sizes by name.

    Sizes already known are passed by name; all others are read from the tensor. A digit in the pattern is that size.

    Raises:
        TypeError: `value` is no tensor.
        ValueError: another number of dimensions, or a size that differs from one already known.
    """
    check_tensor(name, value)
    assert isinstance(value, Tensor)
    axes = pattern.split()
    # The message is made after the fact: formatting a size ties a compiled graph, or an exported one, to its value.
    if value.dim() != len(axes):
        raise ValueError(f"{name}: got shape {_shape_text(list(value.shape))}, expected {_pattern_text(axes, sizes)}")
    found = dict(sizes)
    for axis, size in zip(axes, value.shape, strict=True):
        need = int(axis) if axis.isdigit() else found.setdefault(axis, size)
        if size != need:
            raise ValueError(
                f"{name}: got shape {_shape_text(list(value.shape))}, expected {_pattern_text(axes, sizes)}"
            )
    return found


def check_floating(name: str, value: Tensor) -> None:
    """Raise `TypeError` unless `value` has one of the supported floating dtypes."""
    if value.dtype not in FLOATING:
        raise TypeError(f"{name}: got dtype {value.dtype}, expected float16, bfloat16, float32 or float64")


def check_integer(name: str, value: Tensor) -> None:
    """Raise `TypeError` unless `value` holds int64."""
    if value.dtype != torch.int64:
        raise TypeError(f"{name}: got dtype {value.dtype}, expected int64")


def check_same(what: str, **tensors: Tensor) -> None:
    """Raise unless all tensors share their ``device`` or their ``dtype`` (`what`).

    Raises:
        ValueError: devices differ.
        TypeError: dtypes differ.
    """
    (first_name, first), *others = tensors.items()
    for name, value in others:
        got, need = getattr(value, what), getattr(first, what)
        if got != need:
            error = ValueError if what == "device" else TypeError
            raise error(f"{name}: got {what} {got}, expected {need} as {first_name} has")


def check_filled(name: str, value: Tensor) -> None:
    """Raise `ValueError` where a size other than the batch's is zero and the operator has no meaning."""
    if 0 in value.shape:
        raise ValueError(f"{name}: got shape {_shape_text(list(value.shape))}, expected no empty dimension")


def check_positive(name: str, value: int) -> None:
    """Raise unless `value` is an int of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: got {type(value).__name__}, expected an int")
    if value < 1:
        raise ValueError(f"{name}: got {value}, expected at least 1")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise `ValueError` unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(repr, choices))}")


def check_assign_clusters(query: Tensor, prototypes: Tensor, metric: str) -> None:
    """Arguments of `assign_clusters`."""
    sizes = check_shape("query", query, "B N D")
    check_shape("prototypes", prototypes, "K D", D=sizes["D"])
    check_floating("query", query)
    check_floating("prototypes", prototypes)
    check_same("device", query=query, prototypes=prototypes)
    check_choice("metric", metric, ("cosine", "dot"))
    check_filled("prototypes", prototypes)


def check_context_attention(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Arguments of `context_attention`."""
    sizes = check_shape("query", query, "B N D")
    check_shape("key", key, "B N D", **sizes)
    check_shape("value", value, "B N D", **sizes)
    check_floating("query", query)
    check_same("device", query=query, key=key, value=value)
    check_same("dtype", query=query, key=key, value=value)


def check_bank(tokens_name: str, tokens: Tensor, memory: Tensor, prototypes: Tensor, cluster: Tensor | None) -> None:
    """A memory bank and an optional assignment beside the tokens that meet it."""
    sizes = check_shape(tokens_name, tokens, "B N D")
    bank = check_shape("memory", memory, "K M D", D=sizes["D"])
    check_shape("prototypes", prototypes, "K D", K=bank["K"], D=sizes["D"])
    check_floating(tokens_name, tokens)
    check_floating("memory", memory)
    check_same("dtype", memory=memory, prototypes=prototypes)
    check_same("device", **{tokens_name: tokens}, memory=memory, prototypes=prototypes)
    check_filled("memory", memory)
    if cluster is not None:
        check_shape("cluster", cluster, "B N", B=sizes["B"], N=sizes["N"])
        check_integer("cluster", cluster)
        check_same("device", **{tokens_name: tokens}, cluster=cluster)


def check_update_memory(
    tokens: Tensor, memory: Tensor, prototypes: Tensor, k: int | Tensor, rate: float, cluster: Tensor | None
) -> None:
    """Arguments of `update_memory`; a tensor `k` is judged by its shape and dtype alone, never read."""
    check_bank("tokens", tokens, memory, prototypes, cluster)
    slots = memory.shape[1]
    if isinstance(k, Tensor):
        if k.dim() != 0 or k.is_floating_point() or k.dtype == torch.bool:
            raise TypeError(f"k: got a tensor of shape {list(k.shape)} and dtype {k.dtype}, expected a 0-d integer")
        check_same("device", memory=memory, k=k)
    else:
        check_positive("k", k)
        if k > slots:
            raise ValueError(f"k: got {k}, expected 1 to {slots}, the slots of a cluster")
    if not 0 <= rate <= 1:
        raise ValueError(f"rate: got {rate}, expected a number in [0, 1]")


def check_window_similarity(x: Tensor, window: int) -> None:
    """Arguments of `window_similarity`."""
    sizes = check_shape("x", x, "B C H W")
    check_floating("x", x)
    check_positive("window", window)
    if sizes["H"] % window or sizes["W"] % window:
        raise ValueError(f"window: got {window}, expected a divisor of H={sizes['H']} and W={sizes['W']}")


def check_decay_weights(score: Tensor, grid: tuple[int, int], window: int, variant: str) -> None:
    """Arguments of `decay_weights`."""
    check_positive("window", window)
    if grid[0] % window or grid[1] % window:
        raise ValueError(f"window: got {window}, expected a divisor of both sides of the grid {grid[0]}x{grid[1]}")
    check_shape("score", score, "B n_windows", n_windows=(grid[0] // window) * (grid[1] // window))
    check_floating("score", score)
    check_choice("variant", variant, ("paper", "released"))


def check_split_threshold(query: Tensor, key: Tensor) -> None:
    """Arguments of `split_threshold`."""
    sizes = check_shape("query", query, "B N C")
    check_shape("key", key, "B N C", **sizes)
    check_floating("query", query)
    check_same("device", query=query, key=key)
    check_same("dtype", query=query, key=key)
    if sizes["N"] == 0:
        raise ValueError(f"query: got shape {list(query.shape)}, expected at least one token")


def check_split_attention(
    query: Tensor, key: Tensor, value: Tensor, row_mean: Tensor, threshold: Tensor, variant: str
) -> None:
    """Arguments of `split_attention`."""
    sizes = check_shape("query", query, "B N C")
    check_shape("key", key, "B N C", **sizes)
    check_shape("value", value, "B N C", **sizes)
    check_shape("row_mean", row_mean, "B N", B=sizes["B"], N=sizes["N"])
    check_shape("threshold", threshold, "B N", B=sizes["B"], N=sizes["N"])
    check_floating("query", query)
    check_floating("row_mean", row_mean)
    check_same("device", query=query, key=key, value=value, row_mean=row_mean, threshold=threshold)
    check_same("dtype", query=query, key=key, value=value)
    check_same("dtype", row_mean=row_mean, threshold=threshold)
    check_choice("variant", variant, ("paper", "released"))


def check_powerset_loss(heads: Sequence[Tensor], label: Tensor) -> None:
    """Arguments of `powerset_loss`; label values are checked where data is loaded."""
    if not isinstance(heads, (list, tuple)) or not heads:
        raise TypeError(f"heads: got {type(heads).__name__}, expected a list of at least one tensor")
    if len(heads) > 6:
        raise ValueError(f"heads: got {len(heads)} heads, expected at most 6 (63 subsets)")
    sizes = check_shape("label", label, "B h w")
    check_integer("label", label)
    check_shape("heads[0]", heads[0], "B classes h_0 w_0", B=sizes["B"])
    classes = heads[0].shape[1]
    for i, head in enumerate(heads):
        check_shape(f"heads[{i}]", head, f"B classes h_{i} w_{i}", B=sizes["B"], classes=classes)
        check_floating(f"heads[{i}]", head)
        check_same("device", label=label, **{f"heads[{i}]": head})
        check_same("dtype", **{"heads[0]": heads[0], f"heads[{i}]": head})
        if head.shape[2] > sizes["h"] or head.shape[3] > sizes["w"]:
            raise ValueError(
                f"heads[{i}]: got a grid of {head.shape[2]}x{head.shape[3]}, "
                f"expected at most the label's {sizes['h']}x{sizes['w']}"
            )
