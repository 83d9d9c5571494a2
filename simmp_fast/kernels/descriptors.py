"""A static check of where Hopper's matrix products are told to read shared memory.

A product by a warp group takes its operands in shared memory by descriptor: a pair of uniform registers, the address in
the lower one and constants (layout, strides) in the upper one. ptxas 12.8, the one in Triton 3.6 and 3.7, now and then
takes another register in place of the lower one: the product then reads anywhere, or faults. No barrier is wrong there,
so the walk for hazards sees nothing.

Here it is followed through every path what each uniform register may have been made from. An address must come from
the base of shared memory, and neither of the two from arguments or the block's number. What is handed over from the
registers of a thread is not followed further, and believed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from .hazards import Finding, Instruction, Kind, parse

_UNIFORM = re.compile(r"(?<![A-Z])UR(\d+)")
_DESCRIPTOR = re.compile(r"gdesc\[UR(\d+)\]")
# What a register may be made from; constants leave no trace.
BASE, BLOCK, ARGUMENT, THREAD, UNSET = "shared memory", "the block's number", "an argument", "a thread", "nothing"
Origin = frozenset[str]
_REGISTERS = 64
_State = tuple[Origin, ...]


def _result(here: Instruction) -> tuple[int, int] | None:
    """The uniform register that is written, and how many; None if none is."""
    for operand in here.operands:
        found = re.fullmatch(r"UR(\d+)(\.\w+)*", operand)
        if found:
            wide = ".64" in here.opcode or "WIDE" in here.opcode
            return int(found[1]), 2 if wide else 1
        if not re.fullmatch(r"!?U?P(\d|T)", operand):
            return None
    return None


def _sources(here: Instruction, state: _State, half: int) -> Origin:
    """Where the operands come from; `half` is the word that is looked at where pairs are added word by word."""
    found: set[str] = set()
    paired = ".64" in here.opcode and "WIDE" not in here.opcode
    skipped = False
    for operand in here.operands:
        uniform = _UNIFORM.search(operand)
        if uniform and not skipped:
            skipped = True  # the result
            continue
        if "c[" in operand:
            found.add(ARGUMENT)
        if uniform:
            first = int(uniform[1])
            found |= state[first + half] if paired and first + half < _REGISTERS else state[first]
        elif re.search(r"(?<![A-Z])R\d", operand):
            found.add(THREAD)
    return frozenset(found)


def _after(here: Instruction, state: _State) -> _State:
    """The state behind an instruction."""
    result = _result(here)
    if result is None or here.is_product:
        return state
    changed = list(state)
    for half in range(result[1]):
        if here.name == "S2UR":
            special = here.operands[-1]
            new = frozenset({BASE if "CgaCtaId" in special else BLOCK if "CTAID" in special else THREAD})
        elif here.name.startswith(("ULDC", "LDCU")):
            new = frozenset({ARGUMENT})
        elif here.name in ("R2UR", "VOTEU", "REDUX", "CREDUX"):
            new = frozenset({THREAD})
        else:
            new = _sources(here, state, half)
        number = result[0] + half
        changed[number] = new | changed[number] if here.predicate else new
    return tuple(changed)


def _wrong(here: Instruction, state: _State) -> Iterator[str]:
    """What is wrong with the descriptors of a product."""
    for place, operand in enumerate(here.operands):
        found = _DESCRIPTOR.search(operand)
        if not found:
            continue
        # The left operand's pair comes first; it is empty where that operand lies in registers.
        pairs = (0, 2) if place == 1 else (2,)
        for pair in pairs:
            low, high = (state[int(found[1]) + pair + word] for word in (0, 1))
            if low - {BASE, THREAD} or not low:
                yield f"UR{int(found[1]) + pair} comes from {', '.join(sorted(low)) or 'constants'}"
            elif high - {THREAD, BASE}:  # the two words may have been exchanged by three exclusive ors
                yield f"UR{int(found[1]) + pair + 1} comes from {', '.join(sorted(high))}"


def _ways(at: int, here: Instruction, labels: dict[str, int]) -> list[int] | None:
    """Where an instruction that branches goes on; None where the next one follows."""
    onward = [at + 1] if here.conditional else []
    if here.name in ("BRA", "BSSY", "CALL"):
        # Both ways: where threads meet again, or a call returns, is a way as well.
        return [labels[here.label], *(onward if here.name == "BRA" else [at + 1])]
    if here.name in ("EXIT", "RET"):
        return onward
    return None


def check(sass: str) -> list[Finding]:
    """Every product in a kernel's disassembly that may be told to read elsewhere than in shared memory."""
    instructions, labels = parse(sass)
    if not any(here.is_product for here in instructions):
        return []
    starts = sorted({0, *labels.values()})
    known: dict[int, _State] = {0: (frozenset({UNSET}),) * _REGISTERS}
    todo, findings = [0], {}
    while todo:
        at = todo.pop()
        state = known[at]
        following: list[int] = [at + 1]
        while at < len(instructions):
            here = instructions[at]
            if not here.never:
                if here.is_product:
                    for text in _wrong(here, state):
                        findings[here.address] = Finding(Kind.DESCRIPTOR, here.address, here.address, here.text, text)
                state = _after(here, state)
                ways = _ways(at, here, labels)
                if ways is not None:
                    following = ways
                    break
            at += 1
            if at in starts:
                following = [at]
                break
        for way in following:
            if way >= len(instructions):
                continue
            before = known.get(way)
            joined = state if before is None else tuple(a | b for a, b in zip(before, state, strict=True))
            if joined != before:
                known[way] = joined
                todo.append(way)
    return [findings[address] for address in sorted(findings)]
