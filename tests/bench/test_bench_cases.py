"""The registry, the formulas, and who is measured."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from bench import backends, cases, problems
from bench.backends import BACKENDS
from bench.formulas import FORMULAS, head_sides
from bench.plots import STYLES
from simmp_fast.config import ConfigError, preset
from simmp_fast.model import SimMPNet

CPU = torch.device("cpu")


def test_sixteen_blocks_are_those_of_the_network() -> None:
    with torch.device("meta"):
        model = SimMPNet(preset("synapse").model)
    there = sorted((block.channels, block.dim, len(block.bank.prototypes)) for block in model.memory_blocks())
    registered = [
        (case.sizes["C"], case.sizes["D"], case.sizes["K"])
        for case in cases.registry("cuda")
        if case.group == "blocks"
        for _ in range(case.uses)
    ]
    assert sorted(registered) == there
    assert len(registered) == 16


def test_shapes_of_the_issue() -> None:
    everything = cases.registry("cuda")
    assert all(c.sizes["B"] == 20 for c in everything if c.group in ("blocks", "dsgim", "loss", "step"))
    swept = {case.sizes["N"] for case in everything if case.group == "sweep N"}
    assert {196, 12544} <= swept
    assert {case.group for case in everything} >= {f"sweep {name}" for name in "NKMDB"}
    evaluation = next(case for case in everything if case.group == "evaluation")
    assert (evaluation.sizes["slices"], evaluation.sizes["side"]) == (148, 512)
    names = [case.name for case in everything]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("operator", ["context_attention", "memory_attention", "split_attention", "assign_clusters"])
def test_operations_are_those_that_the_definition_multiplies(operator: str) -> None:
    """The definition of the split makes one product with the sum of both weights, as the formula counts."""
    sizes = cases._TINY[operator]
    problem = problems.make(operator, sizes, torch.float32, CPU)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        problem.run(BACKENDS["reference"])()
    counted = counter.get_total_flops()
    assert FORMULAS[operator].forward(sizes, 4).flops == counted


# Shapes of the arguments that the kernels' own formulas read.
_SHAPES = {
    "assign_clusters": lambda s: [(s["B"], s["N"], s["D"]), (s["K"], s["D"])],
    "context_attention": lambda s: [(s["B"], s["N"], s["D"])] * 3,
    "memory_attention": lambda s: [(s["B"], s["N"], s["D"]), *_bank_shapes(s)],
    "memory_context_attention": lambda s: [*[(s["B"], s["N"], s["D"])] * 3, *_bank_shapes(s)],
    "update_memory": lambda s: [(s["B"], s["N"], s["D"]), *_bank_shapes(s)],
    "window_similarity": lambda s: [(s["B"], s["C"], s["H"], s["W"])],
    "decay_weights": lambda s: [
        (s["B"], (s["H"] // s["window"]) * (s["W"] // s["window"])), s["H"], s["W"], s["window"], 0.8, False
    ],
    "split_threshold": lambda s: [(s["B"], s["N"], s["C"])] * 2,
    "split_attention": lambda s: [(s["B"], s["N"], s["C"])] * 3,
    "powerset_loss": lambda s: [
        [(s["B"], s["classes"], side, side) for side in head_sides(s)], (s["B"], s["side"], s["side"])
    ],
}  # fmt: skip


def _bank_shapes(s: dict[str, int]) -> list[tuple[int, ...] | None]:
    return [(s["K"], s["M"], s["D"]), (s["K"], s["D"]), None]


@pytest.mark.parametrize("operator", sorted(_SHAPES))
def test_operations_are_those_that_the_kernels_register(operator: str) -> None:
    pytest.importorskip("triton")
    pytest.importorskip("simmp_fast.kernels")
    registered = flop_registry[getattr(torch.ops.simmp_fast, operator)]
    sizes = cases.DEFAULTS[operator]
    assert FORMULAS[operator].forward(sizes, 2).flops == registered(*_SHAPES[operator](sizes), out_val=None)


def test_both_directions_add_up() -> None:
    for name, formula in FORMULAS.items():
        sizes = cases.DEFAULTS[name]
        parts = [formula.of(direction, sizes, 2) for direction in ("forward", "backward")]
        if formula.backward is not None:
            assert formula.of("both", sizes, 2) == parts[0] + parts[1], name


def test_shape_option() -> None:
    (case,) = cases.select("cpu", ["context_attention"], shapes=[cases.parse_shape("N=50,D=8")])
    assert dict(case.sizes) == {"B": 1, "N": 50, "D": 8}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"operators": ["attention"]}, "operator: got 'attention', expected one of assign_clusters"),
        ({"groups": ["sweep Q"]}, "--group: got 'sweep Q'"),
        ({"operators": ["powerset_loss"], "shapes": [{"N": 3}]}, "powerset_loss has no size 'N'"),
        ({"shapes": [{"N": 3}]}, "got no operator"),
        ({"operators": ["dsgim"], "groups": ["blocks"]}, "holds no case"),
    ],
)
def test_bad_selection(arguments: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cases.select("cpu", **arguments)


def test_bad_shape() -> None:
    with pytest.raises(ConfigError, match="--shape: got 'N:3'"):
        cases.parse_shape("N:3")


def test_backends() -> None:
    def names(*given: str, operator: str = "context_attention", compiled: bool = False) -> list[str]:
        return [b.name for b in backends.choose(given, CPU, operator, compiled)]

    assert names() == ["reference", "portable", "sdpa"]
    assert names(operator="powerset_loss", compiled=True) == [
        "reference", "reference-compiled", "portable", "portable-compiled",
    ]  # fmt: skip
    assert names("portable") == ["reference", "portable"], "the baseline is always there"
    with pytest.raises(ConfigError, match="'triton' cannot run here"):
        names("triton")
    with pytest.raises(ConfigError, match="--backend: got 'cudnn'"):
        names("cudnn")
    with pytest.raises(ConfigError, match="'sdpa-flash' cannot run here: the tensors are on cpu"):
        names("sdpa-flash")


def test_every_backend_has_a_style_of_its_own() -> None:
    assert STYLES.keys() == BACKENDS.keys()
    assert len(set(STYLES.values())) == len(STYLES)


def test_context_attention_at_every_block() -> None:
    """The shapes that the blocks call it with, as often as they do: in C dimensions where C < D."""
    shapes = {(tokens, width): uses for _, tokens, width, uses in cases.contexts()}
    assert sum(shapes.values()) == sum(uses for *_, uses in cases.BLOCKS) == 16
    assert shapes[3136, 96] == 3
    assert shapes[784, 128] == 1
