"""Ahead-of-time compilation of one kernel in one pinned configuration, and what the machine code needs.

Works without a GPU. A kernel module names its kernels with `register_kernel`; `plan` crosses them with the table.
"""

from __future__ import annotations

import ast
import hashlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import descriptors, hazards
from .configs import SHARED_LIMITS, TARGETS, Config, lookup, rows, widths
from .hopper import mended
from .launch import FP_FUSION, dot_precision

# What is compiled for a dtype class, by the names PyTorch uses; TF32 is float32 with another product.
DTYPES = {"half": ("bfloat16", "float16"), "float32": ("float32",), "tf32": ("tf32",), "any": ("bfloat16", "float32")}
POINTERS = {"bfloat16": "*bf16:16", "float16": "*fp16:16", "float32": "*fp32:16", "tf32": "*fp32:16"}
MATRIX = ("wgmma", "tcgen05", "mma.sync")
# Products of half precision that do not use the target's matrix instruction: none may be left.
UNMATCHED = "unmatched"
# The matrix instructions of a target, by the major number of its compute capability; the others have `mma.sync` alone.
_WANTED = {9: ("wgmma",), 10: ("tcgen05", "mma.sync")}


@dataclass(frozen=True)
class Signature:
    """How a kernel is compiled: its run-time arguments and its constants.

    Args:
        kernel: the `triton.jit` function.
        arguments: Triton type of every run-time argument, or a tuple of types for a tuple of arguments; a suffix
            ``:16`` marks a multiple of 16.
        constants: value of every `tl.constexpr` but the tile sizes, and None for an absent pointer.
        products: whether it multiplies matrices in its input dtype, so that matrix instructions must appear.
    """

    kernel: Any
    arguments: Mapping[str, str | tuple[str, ...]]
    constants: dict[str, Any]
    products: bool = True


@dataclass(frozen=True)
class Case:
    """One line of the report: a kernel, the dtype it is compiled in, its configuration and the target."""

    kernel: str
    dtype: str
    config: Config
    capability: tuple[int, int]

    @property
    def label(self) -> str:
        target = f"sm_{self.capability[0] * 10 + self.capability[1]}"
        return f"{self.kernel} {self.config.width} {self.dtype} {target}"


@dataclass(frozen=True)
class Resources:
    """What the machine code of a case needs: registers a thread, stack bytes a thread, shared bytes a block.

    `hazards` counts those of `hazards.Kind` by their names, zeros included, where it was looked for them: with `wgmma`.
    """

    registers: int
    stack: int
    shared: int
    instructions: dict[str, int] = field(hash=False)
    hazards: dict[str, int] = field(hash=False, default_factory=dict)


Builder = Callable[[Config, str], Signature]
_BUILDERS: dict[str, Builder] = {}


def register_kernel(name: str, build: Builder) -> None:
    """Name a kernel of the table; ``build(config, dtype)`` says how it is compiled in a dtype of `DTYPES`."""
    _BUILDERS[name] = build


def precision_of(dtype: str) -> str:
    """`input_precision` for a dtype of `DTYPES`, as the launch would pass it."""
    return dot_precision("tf32" if dtype == "tf32" else "float32")


def signature(case: Case) -> Signature:
    """How a case is compiled."""
    return _BUILDERS[case.kernel](case.config, case.dtype)


def plan() -> Iterator[Case]:
    """Every case: each kernel, dtype, shape class and target, with the configuration that the lookup takes there."""
    for kernel in dict.fromkeys(row.kernel for row in rows()):
        for dtype in dict.fromkeys(row.dtype for row in rows(kernel)):
            for width in widths(kernel, dtype):
                for capability in TARGETS:
                    config = lookup(kernel, dtype, width, capability, SHARED_LIMITS[capability])
                    for name in DTYPES[config.dtype]:
                        yield Case(kernel, name, config, capability)


def _sources(function: Any, seen: dict[str, str]) -> None:
    """A kernel and the device functions and constants it uses, without comments or layout.

    As source text, which is the same for every Python; what a tree looks like is not.
    """
    name = f"{function.fn.__module__}.{function.fn.__name__}"
    if name in seen:
        return
    seen[name] = ast.unparse(ast.parse(function.src))
    scope = function.fn.__globals__
    for word in sorted(set(re.findall(r"\w+", function.src))):
        value = scope.get(word)
        if isinstance(value, triton.JITFunction):
            _sources(value, seen)
        elif isinstance(value, triton.language.constexpr):
            seen[f"{name}.{word}"] = repr(value.value)


def fingerprint(case: Case) -> str:
    """Changes whenever the code, the constants or the configuration of a case change; not with comments or layout."""
    how, seen = signature(case), dict[str, str]()
    _sources(how.kernel, seen)
    config = (sorted(case.config.tiles.items()), case.config.warps, case.config.stages, FP_FUSION)
    text = repr((sorted(seen.items()), how.arguments, sorted(how.constants.items(), key=str), config))
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def compile_case(case: Case) -> Resources:
    """Compile a case to machine code for its target and read what it needs; see `compiled_kernel`."""
    return resources_of(compiled_kernel(case), case.capability)


def compiled_kernel(case: Case) -> Any:
    """A case compiled to machine code for its target.

    Raises:
        RuntimeError: the kernels are interpreted here, so there is nothing to compile.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET: got 1, expected it unset: an interpreted kernel cannot be compiled")
    how = signature(case)
    constants = {**how.constants, **case.config.tiles}
    types: dict[str, str | tuple[str, ...]] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for position, name in enumerate(how.kernel.arg_names):
        if name in constants:
            types[name] = "constexpr"
            continue
        argument = how.arguments[name]
        parts = [text.partition(":") for text in ((argument,) if isinstance(argument, str) else argument)]
        types[name] = parts[0][0] if isinstance(argument, str) else tuple(part[0] for part in parts)
        for i, (_, _, divisible) in enumerate(parts):
            if divisible:
                path = (position,) if isinstance(argument, str) else (position, i)
                attributes[path] = [["tt.divisibility", int(divisible)]]
    source = ASTSource(how.kernel, types, constants, attributes)
    target = GPUTarget("cuda", case.capability[0] * 10 + case.capability[1], 32)
    options = {"num_warps": case.config.warps, "num_stages": case.config.stages, "enable_fp_fusion": FP_FUSION}
    with mended():
        return triton.compile(source, target=target, options=options)


def resources_of(compiled: Any, capability: tuple[int, int]) -> Resources:
    """What a compiled kernel needs, however it came to be compiled; `capability` is that of its target."""
    registers, stack = _usage(compiled.asm["cubin"])
    text = compiled.asm["ptx"]
    patterns = {"wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma", "mma.sync": "mma.sync"}
    counts = {name: text.count(pattern) for name, pattern in patterns.items()}
    wanted = matrix_instructions(capability)
    counts[UNMATCHED] = sum(found not in wanted for found in half_products(compiled.asm["ttgir"]))
    dangers = {}
    if counts["wgmma"]:
        kinds = [finding.kind for finding in hazards_of(compiled)]
        dangers = {kind.value: kinds.count(kind) for kind in hazards.Kind}
    return Resources(registers, stack, compiled.metadata.shared, counts, dangers)


def hazards_of(compiled: Any) -> list[hazards.Finding]:
    """The hazards in the machine code of a kernel that was compiled for Hopper."""
    sass = hazards.disassemble(compiled.asm["cubin"])
    return [*hazards.check(sass, compiled.metadata.num_warps), *descriptors.check(sass)]


def matrix_instructions(capability: tuple[int, int]) -> tuple[str, ...]:
    """Those by which a product of half precision is taken on a target, by their names in `MATRIX`."""
    return _WANTED.get(capability[0], ("mma.sync",))


def half_products(ttgir: str) -> list[str]:
    """The instruction that each product of half-precision operands becomes, in the order of the compiled program.

    The last form before machine code says it: a product by warp groups, one in tensor memory, or one whose result lies
    as `mma.sync` leaves it; any other layout is multiplied number by number ("fma").
    """
    layouts = re.findall(r"^(#\w+) = #ttg\.nvidia_mma<", ttgir, re.MULTILINE)
    found = []
    for line in ttgir.splitlines():
        product = re.search(r"\b(tt\.dot|ttng\.warp_group_dot|ttng\.tc_gen5_mma)\b.* : (.*)", line)
        if product is None or not re.search(r"x(bf16|f16)[,>]", product[2].split(" * ")[0].split("->")[0]):
            continue
        if product[1] == "tt.dot":
            found.append("mma.sync" if any(f"{name}>" in product[2].split("->")[-1] for name in layouts) else "fma")
        else:
            found.append("wgmma" if product[1] == "ttng.warp_group_dot" else "tcgen05")
    return found


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes a thread, from the resource dump of a cubin."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        dump = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", dump)
    if found is None:
        raise RuntimeError(f"cuobjdump: got no resource usage in {dump!r}")
    return int(found[1]), int(found[2])


def faults(case: Case, found: Resources) -> list[str]:
    """What a case breaks: stack beyond its allowance, shared memory beyond the row or device, a product in
    half precision without the matrix instruction of the target, a hazard around an asynchronous product."""
    wrong = []
    if found.stack > case.config.stack:
        wrong.append(f"{case.label}: stack of {found.stack} bytes, allowed {case.config.stack}")
    if found.shared > SHARED_LIMITS[case.capability]:
        wrong.append(
            f"{case.label}: {found.shared} bytes of shared memory, the device has {SHARED_LIMITS[case.capability]}"
        )
    if found.shared > case.config.shared:
        wrong.append(f"{case.label}: {found.shared} bytes of shared memory, its row says {case.config.shared}")
    if case.dtype in ("bfloat16", "float16") and signature(case).products:
        wanted = matrix_instructions(case.capability)
        if not any(found.instructions[name] for name in wanted):
            wrong.append(f"{case.label}: no {' or '.join(wanted)} in its products")
    if found.instructions[UNMATCHED]:
        wrong.append(f"{case.label}: {found.instructions[UNMATCHED]} of its half-precision products by other means")
    if found.instructions["wgmma"] and not found.hazards:
        wrong.append(f"{case.label}: its machine code was not searched for hazards")
    for kind, count in found.hazards.items():
        if count:
            wrong.append(f"{case.label}: {count} hazards of kind {kind}")
    return wrong
