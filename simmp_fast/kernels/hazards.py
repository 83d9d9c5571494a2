"""A static check of Hopper machine code for hazards around its asynchronous matrix products.

A product by a warp group (`wgmma`, HGMMA in machine code) runs on while the program continues. Until a wait retires it,
nobody may touch its accumulator or overwrite the registers of its left operand; the shared memory it reads must have
been made visible to it before, and must not be rewritten before every warp group has retired its reads. All of this is
the compilers' part, and compilers with faults in it are in use. On a GPU they show now and then at best. Here every
path through the disassembly is walked, loops until nothing new can happen, with what is under way at each instruction.

Registers are exact. Shared memory is followed without addresses, so what is found there is a reason to look:

- `FENCE` takes every write for one that the product reads.
- `REWRITE` looks at writes of what products read, each taken for one into what the last product read. Those are copies
  by cp.async, where products read them as they arrived and not through registers, and stores with a fence behind them.
  Stores that are loaded again first are an exchange between threads, and are not looked at.
- Memory rewritten while a product still runs is not looked for: pipelined loops do that, one buffer further.

A predicated instruction is taken as executed where it does something and as skipped where it protects.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property
from pathlib import Path

import triton


class Kind(StrEnum):
    """What can be wrong, by the word that the report of resources uses."""

    OPERAND = "overwritten-operand"  # a register of a left operand is written before the product was waited for
    ACCUMULATOR = "early-accumulator"  # an accumulator is read or written before that
    REWRITE = "rewritten-shared"  # shared memory written between a warp group's wait and a barrier of all of them
    FENCE = "missing-fence"  # a product reads what ordinary stores or cp.async wrote, without a proxy fence between
    DESCRIPTOR = "wrong-descriptor"  # a product is told to read elsewhere than in shared memory


@dataclass(frozen=True, order=True)
class Finding:
    """One hazard: the earlier instruction, the later one that comes too soon, by address and text."""

    kind: Kind
    earlier: int
    later: int
    earlier_text: str
    later_text: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.earlier:#06x} {self.earlier_text} ... {self.later:#06x} {self.later_text}"


_REGISTER = re.compile(r"(?<![A-Z])R(\d+)(\.64)?")
_PREDICATE = re.compile(r"!?U?P(\d|T)")
# Instructions whose first register is a source.
_NO_RESULT = ("ST", "STG", "STS", "STL", "STSM", "RED", "LDGSTS", "R2P", "FCHK", "BAR", "BRA", "BRX", "RET", "CALL")
_MEMORY = ("LD", "LDG", "LDS", "LDL", "LDC", "ST", "STG", "STS", "STL", "ATOM", "ATOMG", "ATOMS", "RED")
_STORES = ("STS", "STSM", "ATOMS")
_PROTECTS = ("WARPGROUP", "DEPBAR", "FENCE", "BAR")


def _mask(first: int, count: int) -> int:
    return ((1 << count) - 1) << first


def _registers(operand: str, count: int = 1) -> int:
    """The registers an operand names, as a set of bits; `count` from the first where it does not say 64 bits."""
    found = 0
    for match in _REGISTER.finditer(operand):
        found |= _mask(int(match[1]), 2 if match[2] else count)
    return found


@dataclass(frozen=True)
class Instruction:
    """One line of a disassembly."""

    address: int
    text: str
    predicate: str
    opcode: str
    operands: tuple[str, ...]

    @cached_property
    def name(self) -> str:
        return self.opcode.split(".")[0]

    @cached_property
    def never(self) -> bool:
        return self.predicate in ("!PT", "!UPT")

    @cached_property
    def conditional(self) -> bool:
        """Whether it may be skipped; a branch also where it asks a register of its own."""
        return bool(self.predicate) or (self.name == "BRA" and len(self.operands) > 1)

    @cached_property
    def is_product(self) -> bool:
        return self.name.endswith("GMMA")

    @cached_property
    def label(self) -> str:
        """Where a branch or call goes."""
        found = re.search(r"`\((.+?)\)", self.text)
        return found[1] if found else ""

    @cached_property
    def accumulator(self) -> int:
        """Of a product by a warp group: 64 rows among 128 threads, 32 bits or half of that an element."""
        shape = re.search(r"64x(\d+)x", self.opcode)
        assert shape is not None
        half = ".F16" in self.opcode and ".F32" not in self.opcode
        return _registers(self.operands[0], int(shape[1]) // (4 if half else 2))

    @cached_property
    def left_operand(self) -> int:
        """Of a product by a warp group: registers, where its left operand lies there."""
        return 0 if "gdesc" in self.operands[1] else _registers(self.operands[1], 4)

    @cached_property
    def _widths(self) -> tuple[int, list[int]]:
        """Registers of the result, and of each operand."""
        name, parts = self.name, self.opcode.split(".")[1:]
        plain = [1] * len(self.operands)
        if name in _MEMORY:
            width = 4 if "128" in parts else 2 if "64" in parts else 1
            return width, [1 if "[" in operand else width for operand in self.operands]
        if name in ("LDSM", "STSM"):
            width = int(parts[-1]) if parts[-1].isdigit() else 1
            return width, [1 if "[" in operand else width for operand in self.operands]
        if name == "HMMA":
            deep = parts[0] == "16816" or (parts[0] == "1688" and "TF32" in parts)
            result = 4 if "F32" in parts else 2
            return result, [result, 4 if deep else 2, 2 if deep else 1, *[result] * (len(plain) - 3)]
        if name == "IMAD" and "WIDE" in parts:
            return 2, [*plain[:-1], 2] if not _PREDICATE.fullmatch(self.operands[-1]) else [*plain[:-2], 2, 1]
        if name == "CS2R":
            return (1 if "32" in parts else 2), plain
        if name in ("DADD", "DMUL", "DFMA", "DSETP", "DMNMX"):
            return 2, [2] * len(plain)
        if name in ("F2F", "F2I", "I2F"):  # result and source type, where they are named
            wide = [part.endswith("64") for part in parts if re.fullmatch(r"[FSU](16|32|64)", part)]
            into = wide[0] if wide and name != "I2F" else "F64" in parts
            source = wide[-1] if wide and name != "F2I" else "F64" in parts
            return 1 + into, [1 + source] * len(plain)
        return 1, plain

    @cached_property
    def _result(self) -> int | None:
        """Which operand is the result: the first behind predicates, if it is a register."""
        if self.name in _NO_RESULT or self.name.endswith("SETP"):
            return None
        for i, operand in enumerate(self.operands):
            if not _PREDICATE.fullmatch(operand):
                return i if re.fullmatch(r"R\d+(\.\w+)*", operand) else None
        return None

    @cached_property
    def writes(self) -> int:
        return 0 if self._result is None else _registers(self.operands[self._result], self._widths[0])

    @cached_property
    def reads(self) -> int:
        found = 0
        for i, (operand, width) in enumerate(zip(self.operands, self._widths[1], strict=True)):
            if i != self._result:
                found |= _registers(operand, width)
        return found


def parse(sass: str) -> tuple[list[Instruction], dict[str, int]]:
    """The instructions of one kernel, and where its labels stand among them."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        label = re.match(r"\s*([.$\w]+):\s*$", line)
        if label:
            labels[label[1]] = len(instructions)
            continue
        found = re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@(\S+)\s+)?(\S+)\s*([^;]*);", line)
        if found:
            operands = tuple(part.strip() for part in found[4].split(",") if part.strip())
            text = re.sub(r"\s+", " ", line.split("*/", 1)[1].split(";")[0]).strip()
            instructions.append(Instruction(int(found[1], 16), text, found[2] or "", found[3], operands))
    return instructions, labels


_NONE = -1
# More groups of copies than any kernel has under way: the oldest then count as arrived, so that every walk ends.
_MOST_COPIES = 32


@dataclass(frozen=True)
class _State:
    """What is under way at a point of the program; instructions by their number, `_NONE` for none."""

    groups: tuple[tuple[int, ...], ...] = ()  # products that were committed, oldest first
    loose: tuple[int, ...] = ()  # products since the last commit
    copies: tuple[int, ...] = ()  # committed groups of cp.async, oldest first, each by its first copy
    copy: int = _NONE  # the first copy since the last commit
    unfenced: int = _NONE  # a write that arrived in shared memory and no fence made visible to products
    retired: int = _NONE  # a product that this warp group has waited for and the others perhaps have not
    store: tuple[int, int] | None = None  # such a product, and a store behind it of which nobody knows yet what for
    source: str = ""  # since copies last arrived: "fresh" until a product reads ("direct") or a store comes ("stored")
    returns: tuple[int, ...] = ()  # where calls return to
    meetings: tuple[tuple[str, int], ...] = ()  # where the threads that part now meet again, by convergence barrier

    def products(self) -> Iterator[int]:
        for group in self.groups:
            yield from group
        yield from self.loose


class _Walk:
    """All paths through one kernel."""

    def __init__(self, sass: str, warps: int) -> None:
        self.instructions, self.labels = parse(sass)
        self.shares = warps > 4  # several warp groups read one tile
        self.direct: set[int] = set()  # products that read copies as they arrived
        self.found: dict[tuple[Kind, int], int] = {}  # by the later instruction: the first of the earlier ones

    def find(self, kind: Kind, earlier: int, later: int) -> None:
        self.found[kind, later] = min(earlier, self.found.get((kind, later), earlier))

    def findings(self) -> Iterator[Finding]:
        for (kind, later), earlier in self.found.items():
            first, second = self.instructions[earlier], self.instructions[later]
            if kind != Kind.REWRITE or second.name != "LDGSTS" or earlier in self.direct:
                yield Finding(kind, first.address, second.address, first.text, second.text)

    def run(self) -> None:
        todo = [(0, _State())] if self.instructions else []
        seen = set(todo)
        while todo:
            at, state = todo.pop()
            for following in self.block(at, state):
                if following not in seen:
                    seen.add(following)
                    todo.append(following)

    def block(self, at: int, state: _State) -> list[tuple[int, _State]]:
        """Walk on to the next branch; the ways to go on from there."""
        while at < len(self.instructions):
            here = self.instructions[at]
            if not here.never and not (here.predicate and here.name in _PROTECTS):
                state = self.step(at, here, state)
                ways = self.successors(at, here, state)
                if ways is not None:
                    return ways
            at += 1
        return []

    def successors(self, at: int, here: Instruction, state: _State) -> list[tuple[int, _State]] | None:
        """The ways on from an instruction that branches; None where the next one follows."""
        onward = [(at + 1, state)] if here.conditional else []
        if here.name == "EXIT":
            return onward
        if here.name == "BRA":
            return [(self.labels[here.label], state), *onward]
        if here.name == "BSYNC":
            target = dict(state.meetings).get(here.operands[0], at + 1)
            kept = tuple(pair for pair in state.meetings if pair[0] != here.operands[0])
            return [(target, replace(state, meetings=kept)), *onward]
        if here.name == "CALL":
            return [(self.labels[here.label], replace(state, returns=(*state.returns, at + 1))), *onward]
        if here.name == "RET":
            back = [(state.returns[-1], replace(state, returns=state.returns[:-1]))] if state.returns else []
            return [*back, *onward]
        if here.name in ("BRX", "JMX"):
            raise NotImplementedError(f"{here.text}: a computed branch cannot be followed")
        return None

    def step(self, at: int, here: Instruction, state: _State) -> _State:
        """What one instruction changes, after looking whether it may."""
        if state.groups or state.loose:
            self.registers(at, here, state)
        name = here.name
        if here.is_product:
            return self.product(at, here, state)
        if name == "WARPGROUP":
            return self.wait(here, state) if "DEPBAR" in here.opcode else state
        if name == "LDGSTS":
            if state.retired != _NONE:
                self.find(Kind.REWRITE, state.retired, at)
            return replace(state, copy=at) if state.copy == _NONE else state
        if name == "LDGDEPBAR":
            return self.arrive(replace(state, copies=(*state.copies, state.copy), copy=_NONE), _MOST_COPIES)
        if name == "DEPBAR" and here.operands[0] == "SB0":
            return self.arrive(state, int(here.operands[1], 16))
        if name in _STORES:
            if state.store is None and state.retired != _NONE:
                state = replace(state, store=(state.retired, at))
            source = "stored" if state.source == "fresh" else state.source
            return replace(state, unfenced=at if state.unfenced == _NONE else state.unfenced, source=source)
        if name in ("LDS", "LDSM"):
            return replace(state, store=None)
        if name in ("UBLKCP", "UTMALDG") and state.retired != _NONE:  # no fence: their side of it is the products'
            self.find(Kind.REWRITE, state.retired, at)
        if here.opcode.startswith("FENCE.VIEW.ASYNC"):
            if state.store is not None:
                self.find(Kind.REWRITE, *state.store)
            return replace(state, unfenced=_NONE, store=None)
        if name == "BAR" and "ARV" not in here.opcode and len(here.operands) == 1:  # with a count: not all warps
            return replace(state, retired=_NONE)
        if name == "BSSY":
            others = [pair for pair in state.meetings if pair[0] != here.operands[0]]
            return replace(state, meetings=tuple(sorted([*others, (here.operands[0], self.labels[here.label])])))
        return state

    def registers(self, at: int, here: Instruction, state: _State) -> None:
        """Look for registers of products under way among those an instruction touches."""
        for number in state.products():
            product = self.instructions[number]
            if here.is_product:
                # The same accumulator again is added to in order; any other overlap is not.
                same = here.accumulator == product.accumulator
                early = here.left_operand & product.accumulator or (not same and here.accumulator & product.accumulator)
                over = here.accumulator & product.left_operand
            else:
                early = (here.reads | here.writes) & product.accumulator
                over = here.writes & product.left_operand
            if early:
                self.find(Kind.ACCUMULATOR, number, at)
            if over:
                self.find(Kind.OPERAND, number, at)

    def product(self, at: int, here: Instruction, state: _State) -> _State:
        if state.unfenced != _NONE:
            self.find(Kind.FENCE, state.unfenced, at)
        if state.source in ("fresh", "direct"):
            self.direct.add(at)
            state = replace(state, source="direct")
        loose = (*[number for number in state.loose if number != at], at)
        if not any(operand.startswith("gsb") for operand in here.operands):
            return replace(state, loose=loose, unfenced=_NONE)
        # A group that is under way already counts once, as the younger: a loop without a wait then ends.
        groups = (*[group for group in state.groups if group != loose], loose)
        return replace(state, groups=groups, loose=(), unfenced=_NONE)

    def wait(self, here: Instruction, state: _State) -> _State:
        left = int(here.operands[-1], 16)
        done = state.groups[: max(0, len(state.groups) - left)]
        retired = done[-1][-1] if done and self.shares else state.retired
        return replace(state, groups=state.groups[len(done) :], retired=retired)

    def arrive(self, state: _State, left: int) -> _State:
        """All groups of cp.async but the youngest `left` have arrived."""
        done = state.copies[: max(0, len(state.copies) - left)]
        written = [copy for copy in done if copy != _NONE]
        state = replace(state, copies=state.copies[len(done) :])
        if not written:
            return state
        return replace(state, unfenced=written[0] if state.unfenced == _NONE else state.unfenced, source="fresh")


def check(sass: str, warps: int) -> list[Finding]:
    """Every hazard in a kernel's disassembly, as `nvdisasm` prints it; `warps` is how many a block of it has.

    Raises:
        NotImplementedError: it has a branch to a computed address.
    """
    walk = _Walk(sass, warps)
    walk.run()
    return sorted(walk.findings())


def disassemble(cubin: bytes) -> str:
    """The machine code of a compiled kernel as text."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([str(tool), "-c", file.name], capture_output=True, text=True, check=True).stdout
