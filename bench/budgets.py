"""What the package promises, held against the rows of a run. A budget that the run says nothing about is left out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .cases import REASSOCIATED, STEP, WITHOUT_BACKBONE
from .rows import OK, PASSED, Row

LARGEST_BLOCK = "encoder stage 1"


@dataclass(frozen=True)
class Budget:
    """One promise.

    Attributes:
        what: in words.
        needed: the bound, as text.
        measured: what the run found, as text.
        met: whether it is kept.
    """

    what: str
    needed: str
    measured: str
    met: bool


def check(rows: Sequence[Row]) -> list[Budget]:
    """All budgets that these rows can judge: those of a CPU or those of a GPU."""
    usable = [row for row in rows if row.status == OK and row.group != "fast"]
    if not usable:
        return []
    on_gpu = usable[0].environment.get("device") == "cuda"
    return [budget for rule in (_GPU if on_gpu else _CPU) for budget in rule(usable)]


def _find(
    rows: Sequence[Row], operator: str, backend: str, direction: str, dtype: str = "", label: str = ""
) -> list[Row]:
    return [
        row for row in rows
        if (row.operator, row.backend, row.direction) == (operator, backend, direction)
        and dtype in ("", row.dtype) and label in ("", row.label) and not row.group.startswith("sweep")
    ]  # fmt: skip


def _at_least(what: str, factor: float, rows: Sequence[Row]) -> list[Budget]:
    """The speed-up over the reference in the same dtype."""
    return [
        Budget(what, f"{factor:g}x", f"{row.speedup:.2f}x", row.speedup >= factor)
        for row in rows[:1]
        if row.speedup is not None
    ]


def _portable(what: str, factor: float, operator: str, label: str = "") -> Callable[[Sequence[Row]], list[Budget]]:
    def rule(rows: Sequence[Row]) -> list[Budget]:
        mine = _find(rows, operator, "portable", "both", "float32", label)
        return _at_least(f"portable against reference, {what}", factor, mine)

    return rule


def _less_memory(what: str, operator: str, label: str = "") -> Callable[[Sequence[Row]], list[Budget]]:
    def rule(rows: Sequence[Row]) -> list[Budget]:
        pairs = [_find(rows, operator, name, "both", "float32", label)[:1] for name in ("portable", "reference")]
        if not all(pairs) or not all(pair[0].peak_bytes for pair in pairs):
            return []
        share = (pairs[0][0].peak_bytes or 0) / (pairs[1][0].peak_bytes or 1)
        return [Budget(f"peak memory of portable over reference, {what}", "below 1", f"{share:.2f}", share < 1)]

    return rule


def _evaluation(rows: Sequence[Row]) -> list[Budget]:
    mine = [row for row in rows if row.operator == "evaluation" and row.speedup is not None]
    return _at_least("metrics of a volume against their definition, same classes", 10, mine)


def _loader(rows: Sequence[Row]) -> list[Budget]:
    rates = [row.rate for row in rows if row.operator == "data_loader" and row.rate is not None]
    if not rates:
        return []
    return [Budget("data loader alone, images a second", "400", f"{max(rates):.0f}", max(rates) >= 400)]


def _step_on_gpu(rows: Sequence[Row]) -> list[Budget]:
    """The fastest right step against the reference in eager float32, which costs what the released code does, and
    against portable compiled."""
    steps = [row for row in rows if row.operator == STEP and row.backend.startswith("triton")]
    right = [row for row in steps if row.parity == PASSED and row.dtype == "bfloat16" and row.median_ms]
    if not right:
        return []
    mine, found = min(right, key=lambda row: row.median_ms or 0), []
    for backend, dtype, factor in (("reference", "float32", 10.0), ("portable-compiled", "bfloat16", 3.0)):
        other = _find(rows, STEP, backend, "both", dtype)
        if other and other[0].median_ms is not None:
            ratio = other[0].median_ms / (mine.median_ms or 1)
            what = f"training step, {mine.backend} bfloat16 against {backend} {dtype}"
            found.append(Budget(what, f"{factor:g}x", f"{ratio:.2f}x", ratio >= factor))
        if backend == "reference" and other and other[0].peak_bytes and mine.peak_bytes:
            share = mine.peak_bytes / other[0].peak_bytes
            found.append(Budget("its peak memory over that of the reference", "0.25", f"{share:.2f}", share <= 0.25))
    if mine.syncs is not None:
        found.append(Budget("host waits in a training step", "0", str(mine.syncs), mine.syncs == 0))
    return found


def _block_on_gpu(rows: Sequence[Row]) -> list[Budget]:
    mine = _find(rows, "dmwla_block", "triton", "both", "bfloat16", LARGEST_BLOCK)
    if not mine or not mine[0].median_ms or mine[0].flops is None or mine[0].parity != PASSED:
        return []
    peak = 1e12 * mine[0].environment["bfloat16_tflop_s"]
    share = mine[0].flops / (mine[0].median_ms / 1e3) / peak
    what = "DMW-LA block at 56x56, share of the measured bfloat16 matrix rate"
    found = [Budget(what, "35 %", f"{100 * share:.0f} %", share >= 0.35)]
    sdpa = _find(rows, "context_attention", "sdpa", "both", "bfloat16", REASSOCIATED)
    bank = _find(rows, "memory_attention", "triton", "both", "bfloat16")
    if sdpa and sdpa[0].median_ms and bank and bank[0].roofline_ms:
        bound = sdpa[0].median_ms + bank[0].roofline_ms
        what = "DMW-LA block at 56x56, milliseconds, against SDPA alone plus the roofline of the memory part"
        found.append(Budget(what, f"{bound:.3f}", f"{mine[0].median_ms:.3f}", mine[0].median_ms <= bound))
    return found


def _bandwidth_on_gpu(rows: Sequence[Row]) -> list[Budget]:
    """Kernels that memory bounds, where their tensors do not fit in the L2 cache."""
    found = []
    for row in rows:
        whole = row.group in ("operators", "loss") and row.backend == "triton" and row.dtype == "bfloat16"
        if not whole or row.parity != PASSED or row.bound != "memory" or row.roofline_share is None:
            continue
        if (row.bytes or 0) > 2**20 * row.environment["l2_mib"]:
            what = f"{row.operator}, {row.direction}: share of the measured copy bandwidth"
            found.append(Budget(what, "80 %", f"{100 * row.roofline_share:.0f} %", row.roofline_share >= 0.8))
    return found


_CPU: tuple[Callable[[Sequence[Row]], list[Budget]], ...] = (
    _portable("DMW-LA block at 56x56, forward and backward", 3, "dmwla_block", LARGEST_BLOCK),
    _less_memory("DMW-LA block at 56x56", "dmwla_block", LARGEST_BLOCK),
    _portable("the loss", 2, "powerset_loss"),
    _less_memory("the loss", "powerset_loss"),
    _portable("training step", 1.5, STEP),
    _portable("training step without its backbone", 2, f"{STEP}.{WITHOUT_BACKBONE}"),
    _evaluation,
    _loader,
)
_GPU: tuple[Callable[[Sequence[Row]], list[Budget]], ...] = (
    _step_on_gpu,
    _block_on_gpu,
    _bandwidth_on_gpu,
    _evaluation,
    _loader,
)
