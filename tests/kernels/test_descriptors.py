"""The static check of descriptors finds a product that is told to read elsewhere, on every path, and nothing else."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parent))

from sass import program  # noqa: E402

from simmp_fast.kernels.descriptors import check  # noqa: E402
from simmp_fast.kernels.hazards import Kind  # noqa: E402

# Shared memory begins at UR33; UR6 is made from the block's number, UR7 is an argument.
START = (
    "S2UR UR4, SR_CgaCtaId",
    "UMOV UR33, 0x400",
    "ULEA UR33, UR4, UR33, 0x18",
    "S2UR UR6, SR_CTAID.X",
    "USHF.L.U32 UR6, UR6, 0x7, URZ",
    "ULDC UR7, c[0x0][0x210]",
    "USHF.R.U32.HI UR14, URZ, 0x4, UR33",
    "USGXT.U32 UR14, UR14, 0xe",
    "UMOV UR15, 0x40000040",
)
PRODUCT = "HGMMA.64x32x16.F32.BF16 R88, R24, gdesc[UR12].tnspB, R88, gsb0"
BOTH = "HGMMA.64x32x16.F32.BF16 R88, gdesc[UR12], R88, gsb0"


@pytest.mark.parametrize(
    "lines",
    [
        (PRODUCT,),
        ("UIADD3 UR14, UP0, UR14, 0x40, URZ", "UIADD3.X UR15, URZ, -0x7fffffe0, URZ, UP0, !UPT", PRODUCT),
        ("UIADD3.64 UR14, UR14, 0x40, URZ", PRODUCT),
        ("R2UR UR14, R7", PRODUCT),  # believed
        ("UMOV UR14, UR6", "@!UPT UMOV UR14, UR33", "USHF.R.U32.HI UR14, URZ, 0x4, UR33", PRODUCT),
        ("UMOV UR12, UR14", "UMOV UR13, 0x40000040", BOTH),
    ],
)
def test_addresses_in_shared_memory_are_right(lines: tuple[str, ...]) -> None:
    assert check(program(*START, *lines, "EXIT")) == []


@pytest.mark.parametrize(
    ("lines", "cause"),
    [
        # What ptxas 12.8 made of an H100's attention: another register in place of UR14 and of the zero.
        (
            ("UIADD3 UR14, UP0, UR6, 0x40, URZ", "UIADD3.X UR15, UR6, -0x7fffffe0, URZ, UP0, !UPT", PRODUCT),
            "UR14 comes from the block's number",
        ),
        (("UIADD3.X UR15, UR6, -0x7fffffe0, URZ, UP0, !UPT", PRODUCT), "UR15 comes from the block's number"),
        (("ULEA UR14, UR7, UR14, 0x7", PRODUCT), "UR14 comes from an argument, shared memory"),
        (("UMOV UR14, 0x40", PRODUCT), "UR14 comes from constants"),
        ((BOTH,), "UR12 comes from nothing"),
        (("@UP0 UMOV UR14, UR6", PRODUCT), "UR14 comes from shared memory, the block's number"),
        # Only where the branch is not taken.
        (("@P0 BRA `(.L_x)", "UMOV UR14, UR6", ".L_x:", PRODUCT), "UR14 comes from shared memory, the block's number"),
        # Only in the second round of a loop.
        ((".L_x:", PRODUCT, "UMOV UR14, UR7", "@P0 BRA `(.L_x)"), "UR14 comes from an argument, shared memory"),
    ],
)
def test_other_addresses_are_found(lines: tuple[str, ...], cause: str) -> None:
    (finding,) = check(program(*START, *lines, "EXIT"))
    assert finding.kind == Kind.DESCRIPTOR
    assert finding.later_text == cause


def test_code_without_products_is_not_walked() -> None:
    assert check(program(*START, "BRX R2", "EXIT")) == []
