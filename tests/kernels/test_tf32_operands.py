"""What the compiled TF32 kernels hand to the matrix unit: values that were rounded, never raw float32 bits."""

from __future__ import annotations

import re

import pytest

triton = pytest.importorskip("triton")

from simmp_fast.kernels.aot import Case, compiled_kernel, plan  # noqa: E402
from simmp_fast.kernels.compile import load_kernels  # noqa: E402

load_kernels()
ROUNDING = "cvt.rna.tf32"
# What moves a tile and leaves its values as they are.
MOVES = ("ttg.convert_layout", "ttg.local_alloc", "ttg.local_load", "ttg.memdesc_trans", "tt.trans", "tt.reshape")
COVERING = [
    ("context_forward", 128, (9, 0)),
    ("context_backward_key_value", 128, (8, 0)),
    ("memory_backward_query", 256, (9, 0)),
    ("split_attention_query", 384, (9, 0)),
    ("split_attention_key_value", 384, (10, 0)),
]

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="interpreted kernels are not compiled")


def tf32_case(kernel: str, width: int, capability: tuple[int, int]) -> Case:
    wanted = ("tf32", kernel, width, capability)
    return next(c for c in plan() if (c.dtype, c.kernel, c.config.width, c.capability) == wanted)


def raw_operands(ttgir: str) -> list[str]:
    """The products of a compiled program that take a TF32 operand which no rounding made."""
    made: dict[str, tuple[str, str]] = {}  # the value -> what makes it, and from what; later regions reuse names
    wrong = []
    for line in ttgir.splitlines():
        found = re.match(r"\s*(%\w+)(?::\d+)? = \"?([\w.]+)\"? ?(.*)", line)
        if found is None:
            continue
        name, operation, rest = found.groups()
        if re.search(r"(dot|gen5_mma)$", operation) and "inputPrecision = tf32" in rest:
            for value in re.findall(r"%[\w#]+", rest)[:2]:
                while made.get(value, ("", ""))[0] in MOVES:
                    value = made[value][1]
                if ROUNDING not in made.get(value, ("", ""))[0]:
                    wrong.append(line.strip())
        source = re.search(r"%[\w#]+", rest)
        kind = ROUNDING if operation == "tt.elementwise_inline_asm" and ROUNDING in rest else operation
        made[name] = (kind, source[0] if source else "")
    return wrong


@pytest.mark.parametrize(("kernel", "width", "capability"), COVERING)
def test_every_operand_is_rounded_once_a_tile(kernel: str, width: int, capability: tuple[int, int]) -> None:
    compiled = compiled_kernel(tf32_case(kernel, width, capability))
    ttgir = compiled.asm["ttgir"]
    products = ttgir.count("inputPrecision = tf32")
    assert products, "no TF32 product was found"
    assert not raw_operands(ttgir)
    assert compiled.asm["ptx"].count(ROUNDING)


def test_a_raw_operand_is_found() -> None:
    rounding = '%a = tt.elementwise_inline_asm "cvt.rna.tf32.f32 $0, $1;" {pure = false} %x : tensor<1xf32>'
    program = [rounding, "%b = ttg.local_alloc %a : t", "%c = ttg.local_load %raw : t"]
    good = "%d = tt.dot %b, %a, %z, inputPrecision = tf32 : t"
    bad = "%e = tt.dot %b, %c, %z, inputPrecision = tf32 : t"
    assert raw_operands("\n".join([*program, good, bad])) == [bad]


def test_three_product_precision_rounds_by_itself() -> None:
    """Matching by `tf32x3`: Triton rounds both parts of each operand."""
    compiled = compiled_kernel(tf32_case("assign_clusters", 256, (9, 0)))
    assert compiled.asm["ptx"].count(ROUNDING)
