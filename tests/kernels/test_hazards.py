"""The static check of Hopper machine code finds each kind of hazard where it was planted, and nothing in clean code."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parent))

from sass import program  # noqa: E402

from simmp_fast.kernels.aot import Case, Resources, compiled_kernel, faults, hazards_of, plan  # noqa: E402
from simmp_fast.kernels.compile import MIX, is_current, line, load_kernels, parse  # noqa: E402
from simmp_fast.kernels.hazards import Finding, Kind, check, disassemble  # noqa: E402
from simmp_fast.kernels.hazards import parse as instructions_of  # noqa: E402

load_kernels()

compiles = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="interpreted kernels are not compiled")

# The accumulator is R24 to R39, the left operand R40 to R43 or in shared memory.
PRODUCT = "HGMMA.64x32x16.F32.BF16 R24, R40, gdesc[UR8].tnspB, R24, gsb0"
SHARED = "HGMMA.64x32x16.F32.BF16 R24, gdesc[UR8], R24, gsb0"
WAIT = "WARPGROUP.DEPBAR.LE gsb0, 0x0"
FENCE = "FENCE.VIEW.ASYNC.S"
BARRIER = "BAR.SYNC.DEFER_BLOCKING 0x0"
COPY = "LDGSTS.E.BYPASS.128 [R2+0x1000], desc[UR4][R4.64], !P0"
ARRIVE = "DEPBAR.LE SB0, 0x0"
STORE = "STS.128 [R9+UR33], R16"


def kinds(*lines: str, warps: int = 8) -> list[Kind]:
    return [finding.kind for finding in check(program(*lines, "EXIT"), warps)]


@pytest.mark.parametrize(
    ("touch", "kind"),
    [
        ("FADD R44, R24, R45", Kind.ACCUMULATOR),  # read
        ("FADD R44, R40, R39", Kind.ACCUMULATOR),  # the last one; reading the left operand is allowed
        ("IMAD.WIDE R46, R45, R44, R38", Kind.ACCUMULATOR),  # 64 bits
        ("STG.E.128 desc[UR4][R2.64], R36", Kind.ACCUMULATOR),
        ("LDG.E R26, desc[UR4][R2.64]", Kind.ACCUMULATOR),  # written
        ("MOV R43, R44", Kind.OPERAND),
        ("LDS.64 R42, [R2]", Kind.OPERAND),
        ("LDSM.16.M88.4 R40, [R2]", Kind.OPERAND),
        ("SHFL.BFLY PT, R41, R44, 0x2, 0x1f", Kind.OPERAND),
        ("@P1 MOV R43, R44", Kind.OPERAND),
        ("LDSM.16.M88.4 R44, [R40]", None),
        ("HMMA.16816.F32.BF16 R44, R40, R50, R44", None),
        ("@!PT LDS R24, [RZ]", None),  # never executed
        ("STS [R40], R41", None),
        ("HGMMA.64x32x16.F32.BF16 R24, R40, gdesc[UR8], R24, gsb0", None),  # adds to the same accumulator, in order
        ("HGMMA.64x32x16.F32.BF16 R56, R24, gdesc[UR8], R56, gsb0", Kind.ACCUMULATOR),
        ("HGMMA.64x16x16.F32.BF16 R36, gdesc[UR8], R36, gsb0", Kind.OPERAND),
    ],
)
def test_registers_of_a_product_under_way(touch: str, kind: Kind | None) -> None:
    found = kinds(PRODUCT, touch, WAIT)
    assert (kind in found) if kind else not found
    assert not kinds(PRODUCT, WAIT, BARRIER, touch)


def test_a_wait_retires_all_but_the_youngest_groups() -> None:
    other = PRODUCT.replace("R24", "R56").replace("R40", "R72")
    some = WAIT.replace("0x0", "0x1")
    assert not kinds(PRODUCT, other, some, "MOV R40, R1")
    assert kinds(PRODUCT, other, some, "MOV R72, R1") == [Kind.OPERAND]
    # One group is two products: retired together, with the later one.
    first = PRODUCT.replace(", gsb0", "")
    assert kinds(first, other, some, "MOV R40, R1") == [Kind.OPERAND]


def test_a_hazard_across_the_back_of_a_loop() -> None:
    loop = ["MOV R40, R1", PRODUCT, "ISETP.GE.AND P0, PT, R2, R3, PT", "@!P0 BRA `(.L_x_1)"]
    assert kinds(".L_x_1:", *loop, WAIT) == [Kind.OPERAND]
    assert not kinds(".L_x_1:", *loop[:2], WAIT, *loop[2:])
    # Only the fifth time around: until then no copy has surely arrived.
    copied = [".L_x_1:", COPY, "LDGDEPBAR", ARRIVE.replace("0x0", "0x4"), BARRIER, SHARED, WAIT, BARRIER]
    assert kinds(*copied, *loop[2:], WAIT) == [Kind.FENCE]
    assert not kinds(*copied[:4], FENCE, *copied[4:], *loop[2:], WAIT)


def test_both_sides_of_a_branch_are_walked() -> None:
    skipped = [PRODUCT, "@P0 BRA `(.L_x_1)", WAIT, ".L_x_1:", "MOV R40, R1"]
    assert kinds(*skipped) == [Kind.OPERAND]
    assert not kinds(PRODUCT, "@P0 BRA `(.L_x_1)", WAIT, "EXIT", ".L_x_1:", WAIT, "MOV R40, R1")
    assert kinds(PRODUCT, f"@P0 {WAIT}", "MOV R40, R1") == [Kind.OPERAND]
    assert not kinds(PRODUCT, "@P0 EXIT", WAIT, "MOV R40, R1")


def test_calls_and_threads_that_meet_again_are_followed() -> None:
    called = ["CALL.REL.NOINC `($part)", "MOV R40, R1", "EXIT", "$part:"]
    assert kinds(PRODUCT, *called, "RET.REL.NODEC R6 `(kernel)") == [Kind.OPERAND]
    assert not kinds(PRODUCT, *called, WAIT, "RET.REL.NODEC R6 `(kernel)")
    parted = [PRODUCT, "BSSY B0, `(.L_x_2)", "BSYNC B0", "MOV R40, R1", ".L_x_2:", WAIT]
    assert not kinds(*parted)
    with pytest.raises(NotImplementedError, match="BRX"):
        kinds("BRX R2 -0x10")


def test_a_tile_rewritten_before_all_warp_groups_have_read_it() -> None:
    stored = [STORE, BARRIER, FENCE, SHARED]
    assert kinds(SHARED, WAIT, *stored) == [Kind.REWRITE]
    assert not kinds(SHARED, WAIT, BARRIER, *stored)
    assert not kinds(SHARED, WAIT, *stored, warps=4)  # a single warp group has waited as one
    assert kinds(SHARED, WAIT, "BAR.ARV 0x1, 0x100", *stored) == [Kind.REWRITE]
    assert kinds(SHARED, BARRIER, WAIT, *stored) == [Kind.REWRITE]  # the barrier came before the wait
    assert kinds(SHARED, WAIT, "UTMALDG.2D [UR8], [UR4]") == [Kind.REWRITE]
    # An exchange between threads, in memory of its own.
    assert not kinds(SHARED, WAIT, STORE, BARRIER, "LDS.128 R16, [R9]", FENCE, SHARED)


def test_copies_rewrite_what_copies_brought() -> None:
    arrived = [COPY, "LDGDEPBAR", ARRIVE, FENCE, BARRIER]
    assert kinds(*arrived, SHARED, WAIT, COPY) == [Kind.REWRITE]
    assert not kinds(*arrived, SHARED, WAIT, BARRIER, COPY)
    # The copies went to registers and, rounded, into a tile of their own.
    assert not kinds(*arrived, "LDS.128 R16, [R9]", STORE, FENCE, BARRIER, SHARED, WAIT, COPY)


def test_what_a_product_reads_needs_a_fence() -> None:
    assert kinds(STORE, BARRIER, SHARED) == [Kind.FENCE]
    assert not kinds(STORE, FENCE, BARRIER, SHARED)
    assert not kinds(STORE, BARRIER, FENCE, SHARED)
    assert kinds(COPY, "LDGDEPBAR", FENCE, ARRIVE, BARRIER, SHARED) == [Kind.FENCE]  # too early: not arrived yet
    assert not kinds(COPY, "LDGDEPBAR", ARRIVE, FENCE, BARRIER, SHARED)
    # What is still on its way is not read yet.
    later = ARRIVE.replace("0x0", "0x1")
    assert not kinds(COPY, "LDGDEPBAR", COPY, "LDGDEPBAR", later, FENCE, BARRIER, SHARED)
    # The fence in front of the loop does nothing for what arrives within it.
    loop = [".L_x_1:", ARRIVE, BARRIER, SHARED, WAIT, BARRIER, COPY, "LDGDEPBAR", "@P0 BRA `(.L_x_1)"]
    assert kinds(STORE, FENCE, *loop) == [Kind.FENCE]
    assert not kinds(STORE, *loop[:2], FENCE, *loop[2:])


def test_a_finding_says_where() -> None:
    found = check(program(PRODUCT, "MOV R43, R1"), 8)
    assert found == [Finding(Kind.OPERAND, 0, 16, PRODUCT, "MOV R43, R1")]
    assert str(found[0]) == f"overwritten-operand: 0x0000 {PRODUCT} ... 0x0010 MOV R43, R1"


@pytest.mark.parametrize(
    ("text", "reads", "writes"),
    [
        ("IADD3 R12, P0, R4, UR8, RZ", {4}, {12}),
        ("LOP3.LUT P1, R4, R5, 0x7, RZ, 0xc0, !PT", {5}, {4}),
        ("ISETP.GE.U32.AND P0, PT, R7, R8, PT", {7, 8}, set()),
        ("IMAD.WIDE.U32 R10, P0, R4, R6, R8", {4, 6, 8, 9}, {10, 11}),
        ("LDG.E.64 R6, desc[UR4][R2.64+0x80]", {2, 3}, {6, 7}),
        ("STS.64 [R9+UR33], R16", {9, 16, 17}, set()),
        ("LDGSTS.E.BYPASS.128 [R43+0x1000], desc[UR36][R16.64], !P4", {43, 16, 17}, set()),
        ("ATOMG.E.ADD.F32.FTZ.RN.STRONG.GPU PT, R3, desc[UR4][R6.64], R5", {5, 6, 7}, {3}),
        ("HMMA.16816.F32.BF16 R4, R8, R12, R4", {4, 5, 6, 7, 8, 9, 10, 11, 12, 13}, {4, 5, 6, 7}),
        ("HMMA.1688.F32 R4, R8, R12, RZ", {8, 9, 12}, {4, 5, 6, 7}),
        ("CS2R R20, SRZ", set(), {20, 21}),
        ("R2UR UR11, R0", {0}, set()),
        ("F2F.F32.F64 R2, R4", {4, 5}, {2}),
        ("I2F.F64.S32 R2, R4", {4}, {2, 3}),
        ("FMUL R12, |R13|.reuse, -R14", {13, 14}, {12}),
    ],
)
def test_what_an_instruction_reads_and_writes(text: str, reads: set[int], writes: set[int]) -> None:
    found = instructions_of(program(text))[0][0]
    assert {i for i in range(256) if found.reads >> i & 1} == reads
    assert {i for i in range(256) if found.writes >> i & 1} == writes


def hopper(kernel: str, width: int) -> Case:
    wanted = (kernel, width, "bfloat16", (9, 0))
    return next(case for case in plan() if (case.kernel, case.config.width, case.dtype, case.capability) == wanted)


@compiles
def test_hazards_planted_in_real_machine_code() -> None:
    """A pipelined kernel of two warp groups whose weights are left operands in registers; without one kind of
    instruction at a time."""
    compiled = compiled_kernel(hopper("context_forward", 96))
    sass, warps = disassemble(compiled.asm["cubin"]), compiled.metadata.num_warps
    assert warps == 8

    def without(opcode: str) -> set[Kind]:
        text, count = re.subn(rf"^.*\s{opcode}\b.*\n", "", sass, flags=re.MULTILINE)
        assert count
        return {finding.kind for finding in check(text, warps)}

    ignored = {Kind.FENCE} if triton.__version__.startswith("3.6") else set()
    assert {finding.kind for finding in hazards_of(compiled)} <= ignored
    assert without(r"WARPGROUP\.DEPBAR") >= {Kind.ACCUMULATOR, Kind.OPERAND}
    assert Kind.FENCE in without(r"FENCE\.VIEW\.ASYNC")
    assert Kind.REWRITE in without(r"BAR\.SYNC")


def test_the_report_carries_the_count() -> None:
    case = hopper("context_forward", 96)
    counts = dict.fromkeys(MIX, 0) | {"wgmma": 28}
    none = {kind.value: 0 for kind in Kind}
    clean = Resources(138, 0, case.config.shared, counts, none)
    assert parse(line(case, clean)) == clean
    assert "| wgmma 28 hazards 0 |" in line(case, clean)
    assert not faults(case, clean)
    broken = Resources(138, 0, case.config.shared, counts, none | {Kind.OPERAND.value: 2})
    assert parse(line(case, broken)) == broken
    assert faults(case, broken) == [f"{case.label}: 2 hazards of kind overwritten-operand"]
    plain = Resources(138, 0, case.config.shared, dict.fromkeys(MIX, 0))
    assert parse(line(case, plain)) == plain


def test_a_line_that_was_not_searched_is_not_current() -> None:
    case = hopper("context_forward", 96)
    counts = dict.fromkeys(MIX, 0) | {"wgmma": 28}
    unsearched = Resources(138, 0, case.config.shared, counts)
    assert not is_current(case, line(case, unsearched))
    assert faults(case, unsearched) == [f"{case.label}: its machine code was not searched for hazards"]
    searched = Resources(138, 0, case.config.shared, counts, {kind.value: 0 for kind in Kind})
    assert is_current(case, line(case, searched))


def test_a_missing_fence_is_a_fault() -> None:
    case = hopper("context_forward", 96)
    counts = dict.fromkeys(MIX, 0) | {"wgmma": 28}
    unfenced = {kind.value: int(kind == Kind.FENCE) for kind in Kind}
    found = Resources(138, 0, case.config.shared, counts, unfenced)
    assert faults(case, found) == [f"{case.label}: 1 hazards of kind missing-fence"]
